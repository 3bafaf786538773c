"""Register the format with transformers without importing transformers.

transformers takes seconds to import, and `rlo-gptq --help` or a script that only mentions this
package should not pay them. So if no model class is loaded yet, a finder waits at the beginning of
`sys.meta_path` for that one module: there no other finder can find it first. It leaves the finding
to the others, has the format registered when the module has run, and goes away.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.modeling_utils"
"""Imported before any model can be loaded, and after the quantizers, which our quantizer builds
on."""
QUANTIZER = "rlo_gptq.checkpoint.hf_quantizer"


class _ThenRegister(Loader):
    """Runs a module's own loader, then ours."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(QUANTIZER)


class _Waiter(MetaPathFinder):
    """Finds one module, once, by the other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register_when_needed() -> None:
    """Register the checkpoint format now, or as soon as transformers models are imported."""
    if AWAITED in sys.modules:
        importlib.import_module(QUANTIZER)
    elif not any(isinstance(finder, _Waiter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiter())
