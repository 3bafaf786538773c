"""Rooted losses in Hugging Face: `Trainer(loss="rlo")`, a model's own loss, TRL, and finetuning.

Names are imported when they are first used, so that `rlo-hf --help` loads neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlo_core.modules import RootedLoss as rlo  # noqa: N813 - the README's spelling

    from rlo_hf.finetuning.options import FinetuneOptions as FinetuneOptions
    from rlo_hf.finetuning.run import FinetuneResult as FinetuneResult
    from rlo_hf.finetuning.run import finetune as finetune
    from rlo_hf.model_loss import set_loss as set_loss
    from rlo_hf.plain_trainer import loss_func as loss_func
    from rlo_hf.seq2seq import Seq2SeqTrainer as Seq2SeqTrainer
    from rlo_hf.trainer import Trainer as Trainer

__version__ = "0.1.0"
_HOME = {
    "FinetuneOptions": ("rlo_hf.finetuning.options", "FinetuneOptions"),
    "FinetuneResult": ("rlo_hf.finetuning.run", "FinetuneResult"),
    "finetune": ("rlo_hf.finetuning.run", "finetune"),
    "Seq2SeqTrainer": ("rlo_hf.seq2seq", "Seq2SeqTrainer"),
    "Trainer": ("rlo_hf.trainer", "Trainer"),
    "loss_func": ("rlo_hf.plain_trainer", "loss_func"),
    "rlo": ("rlo_core.modules", "RootedLoss"),
    "set_loss": ("rlo_hf.model_loss", "set_loss"),
}
__all__ = [
    "FinetuneOptions",
    "FinetuneResult",
    "Seq2SeqTrainer",
    "Trainer",
    "__version__",
    "finetune",
    "loss_func",
    "rlo",
    "set_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rlo_hf' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
