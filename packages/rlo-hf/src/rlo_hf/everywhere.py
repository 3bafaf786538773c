"""The loss in every Trainer of a process and of those that it starts, wherever it is made.

Launchers (`trl sft`, `llamafactory-cli train`, `swift sft`, `axolotl train`, one's own packages)
make their Trainer far from the script that is run, often in another process. So while the block of
`reach` lasts, `Trainer.train` and `Trainer.evaluate` of transformers first put the loss in the
Trainer that they are called on. Child processes do the same: they find a `sitecustomize` of this
package first on their path, and the loss in their environment.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "RLO_HF_LOSS"
"""What child processes read: the loss, the check, and the folder where they say what they did."""

_METHODS = ("train", "evaluate", "predict")


def adopt(trainer: Any, loss: str, *, eval_loss: Any = "ce", check: bool = True) -> Any:
    """Put a loss in a Trainer that is made already, and return it.

    Its class becomes a subclass of itself with this package's step in front, so that what the class
    overrides still runs, below it.

    Args:
        trainer: A Trainer of transformers, an SFTTrainer of TRL, or of a subclass of either.
        loss: The spec.
        eval_loss: As `rlo_hf.Trainer`.
        check: As `rlo_hf.Trainer`.

    Raises:
        RLOError: a trainer whose objective is no cross entropy, or that has a loss of its own.
    """
    kinds = [(cls.__module__, cls.__name__) for cls in type(trainer).__mro__]
    if hasattr(trainer, "open_slot"):
        return trainer
    if any(name == "GKDTrainer" and module.startswith("trl.") for module, name in kinds):
        from rlo_core.errors import RLOError

        raise RLOError(
            "GKDTrainer compares whole distributions and has no labels for a loss to act on; a "
            "teacher beside a loss is rlo_hf.trl.SFTTrainer(loss='rlo+kl', reference_model=TEACHER)"
        )
    if ("trl.trainer.sft_trainer", "SFTTrainer") in kinds:
        from rlo_hf.trl import RootedSFTMixin

        _become(trainer, RootedSFTMixin)
        trainer.open_slot(loss, check=check)
        return trainer
    for name in ("DPO", "KTO", "ORPO"):
        if any(own == f"{name}Trainer" and module.startswith("trl.") for module, own in kinds):
            import rlo_hf.trl

            _become(trainer, getattr(rlo_hf.trl, f"{name}Slot"))
            trainer.open_slot(loss, check=check)
            return trainer
    for module, name in kinds:
        if module.startswith("trl.") and not name.startswith("_"):
            from rlo_core.errors import RLOError

            raise RLOError(
                f"{type(trainer).__name__} has an objective of its own and takes no loss; of TRL's "
                "trainers SFTTrainer, DPOTrainer, KTOTrainer and ORPOTrainer do"
            )
    if ("transformers.trainer_seq2seq", "Seq2SeqTrainer") in kinds:
        from rlo_hf.seq2seq import RootedSeq2SeqMixin

        _become(trainer, RootedSeq2SeqMixin)
    else:
        from rlo_hf.trainer import RootedLossMixin

        _become(trainer, RootedLossMixin)
    trainer.open_slot(loss, eval_loss=eval_loss, check=check)
    return trainer


def _become(trainer: Any, mixin: type) -> None:
    kind = type(trainer)
    trainer.__class__ = type(
        kind.__name__, (mixin, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__}
    )


class Reach:
    """What a block of `reach` knows.

    Attributes:
        folder: Where every process leaves a file for each Trainer that was given the loss.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def trainers(self) -> list[str]:
        """The classes that were given the loss, in any process."""
        return sorted(path.read_text() for path in self.folder.glob("trainer-*"))


@contextmanager
def reach(loss: str, *, check: bool = True) -> Iterator[Reach]:
    """Give a loss to every Trainer that trains or evaluates inside the block.

    Args:
        loss: The spec.
        check: As `rlo_hf.Trainer`.
    """
    home = str(Path(__file__).parent / "child_process")
    before = {name: os.environ.get(name) for name in (VARIABLE, "PYTHONPATH")}
    with tempfile.TemporaryDirectory(prefix="rlo-hf-") as folder:
        settings = {"loss": loss, "check": check, "folder": folder}
        paths = [home, *filter(None, [before["PYTHONPATH"]])]
        os.environ.update({VARIABLE: json.dumps(settings), "PYTHONPATH": os.pathsep.join(paths)})
        restore = _patch(settings)
        try:
            yield Reach(Path(folder))
        finally:
            restore()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def install() -> None:
    """Do in a child process what `reach` does in its parent; called by our `sitecustomize`."""
    settings = os.environ.get(VARIABLE)
    if settings and importlib.util.find_spec("transformers") is not None:
        sys.meta_path.insert(0, _AfterImport("transformers.trainer", json.loads(settings)))


class _AfterImport:
    """Patches the Trainer when its module is imported, and not before: not every child trains."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name, self.settings = name, settings

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def executed(module: Any) -> None:
            execute(module)
            _patch_class(module.Trainer, self.settings)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def _patch(settings: dict[str, Any]) -> Any:
    from transformers.trainer import Trainer

    return _patch_class(Trainer, settings)


def _patch_class(kind: Any, settings: dict[str, Any]) -> Any:
    originals = {name: kind.__dict__[name] for name in _METHODS}

    def with_loss(original: Any) -> Any:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not hasattr(self, "open_slot"):
                adopt(self, settings["loss"], check=settings["check"])
                _note(settings["folder"], type(self).__name__)
            return original(self, *args, **kwargs)

        return method

    for name, original in originals.items():
        setattr(kind, name, with_loss(original))

    def restore() -> None:
        for name, original in originals.items():
            setattr(kind, name, original)

    return restore


def _note(folder: str, name: str) -> None:
    handle, path = tempfile.mkstemp(prefix="trainer-", dir=folder)
    os.close(handle)
    Path(path).write_text(name)
