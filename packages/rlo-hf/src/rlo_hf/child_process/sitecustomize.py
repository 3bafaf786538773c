"""First on the path of the processes that `rlo-hf run` starts: gives their Trainers the loss."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

# Another sitecustomize that this one hides is run as it would have been.
_home = str(Path(__file__).parent)
_path = [entry for entry in sys.path if entry != _home]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _path)
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))

from rlo_hf.everywhere import install  # noqa: E402 - after the other one

install()
