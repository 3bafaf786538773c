"""rlo-timm: the loss slot of timm's train.py, and a trainer.

`train` and `evaluate` are what `rlo-timm train` and `rlo-timm eval` call. Importing this module
imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlo_timm.trainer.settings import TrainSettings

if TYPE_CHECKING:
    from rlo_timm.trainer.evaluate import EvalResult, evaluate
    from rlo_timm.trainer.finish import TrainResult
    from rlo_timm.trainer.fit import train

__version__ = "0.1.0"
__all__ = ["EvalResult", "TrainResult", "TrainSettings", "evaluate", "train"]

_HOME = {
    "EvalResult": "rlo_timm.trainer.evaluate",
    "TrainResult": "rlo_timm.trainer.finish",
    "evaluate": "rlo_timm.trainer.evaluate",
    "train": "rlo_timm.trainer.fit",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
