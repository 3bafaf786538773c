"""How the documentation is built: `make docs`, which treats warnings as errors."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

project = "RLO"
author = "The RLO contributors"
copyright = "The RLO contributors, Apache-2.0"
release = importlib.import_module("rlo_core").__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "RLO"
html_static_path: list[str] = []
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # the guides' headings follow what they tell, not a strict tree

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_rtype = False
default_role = "code"

# An example in a docstring may use the names of its module, as doctest itself lets it.
doctest_global_setup = "\n".join(
    f"from {module} import *"
    for page in sorted((Path(__file__).parent / "api").glob("*.md"))
    for module in re.findall(r"automodule:: ([\w.]+)", page.read_text())
)


def _leave_out_foreign(
    app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out what torch, click and transformers define."""
    home = getattr(obj, "__module__", None)
    foreign = isinstance(home, str) and not home.startswith("rlo_")
    return True if foreign or name in ("forward", "extra_repr") else None


def setup(app: Any) -> None:
    """Connect the filter of members."""
    app.connect("autodoc-skip-member", _leave_out_foreign)
