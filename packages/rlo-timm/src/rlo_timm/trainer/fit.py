"""`rlo-timm train` from settings to a finished run folder."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rlo_core.errors import RunError

from rlo_timm.trainer.build import build
from rlo_timm.trainer.callbacks import Epochs, Savers
from rlo_timm.trainer.finish import TrainResult, finish
from rlo_timm.trainer.loaders import Loaders
from rlo_timm.trainer.module import DivergedError
from rlo_timm.trainer.plan import Plan, make_plan
from rlo_timm.trainer.resuming import Resumed, check_resumed, resumable
from rlo_timm.trainer.run_folder import Begin, is_first, writing
from rlo_timm.trainer.settings import TrainSettings

_logger = logging.getLogger("rlo_timm")


def train(
    settings: TrainSettings | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    fast_dev_run: bool = False,
    progress: bool = False,
) -> TrainResult:
    """Train an image classifier, and return what it came to.

    Writes `run.json`, `metrics.jsonl`, `metrics.csv`, `config.yaml`, `checkpoints/best.ckpt` and
    `last.ckpt`, TensorBoard's files, and in the end `model.safetensors` with `config.json` (the
    best weights, as timm loads them) and `report.html`.

    Args:
        settings: The options; None for the authors' run, or for those of the run that is resumed.
        out: The run folder; `runs/NET-TIME` if left out.
        resume: A run folder to go on with; `out` is then the same unless given.
        overwrite: Replace a run that is in `out`.
        fast_dev_run: One batch of training and validation, and no files.
        progress: Show a progress bar.

    Raises:
        RLOError: the data, the network, the loss or the folder is not as it has to be, or the run
            diverged, or another process writes there. A run that cannot start leaves no folder, and
            a resumed one as it was.
        OSError: the disk is full, or the folder cannot be written.
        KeyboardInterrupt: the run was interrupted; `checkpoints/last.ckpt` is the last whole epoch.

    Example:
        >>> import tempfile
        >>> settings = TrainSettings(
        ...     dataset="digits", net="test_resnet", epochs=1, batch_size=32, train_limit=64,
        ...     val_limit=20, workers=0, device="cpu", logger="none", seed=0,
        ... )
        >>> train(settings, out=tempfile.mkdtemp() + "/run").epochs
        1
    """
    kept = writing(settings, out=out, resume=resume, overwrite=overwrite, dry=fast_dev_run)
    with kept as folder, _quiet():
        old = None if resume is None else resumable(resume)
        if settings is None:
            settings = TrainSettings() if old is None else old.settings
        if old is not None:
            check_resumed(old, settings)
        plan = make_plan(settings)
        return _fit(plan, folder, old, fast_dev_run=fast_dev_run, progress=progress)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning says in every run of this kind, and its notes on products."""
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            "The number of training batches.*",
            ".*LeafSpec.*",
            "Found .* module.s. in eval mode at the start of training.*",  # the average
            "Trying to infer the `batch_size`.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            lightning.setLevel(level)


def _fit(
    plan: Plan, folder: Path, old: Resumed | None, *, fast_dev_run: bool, progress: bool
) -> TrainResult:
    settings = plan.settings
    kept = old.seed if old is not None else None
    seed = _seed(kept if settings.seed is None else settings.seed)
    built = build(plan, old, seed, progress=progress)
    if plan.stem is not None and is_first():
        other = "imagenet" if plan.stem == "cifar" else "cifar"
        _logger.info(
            "net %s with the %s stem, for images of %s px; --stem %s takes the other",
            settings.net, plan.stem, settings.size, other,
        )  # fmt: skip
    begin = None
    if not fast_dev_run and is_first():
        begin = Begin(built, folder, old, seed)
    epochs = Epochs(seed, begin)
    callbacks: list[Callback] = [epochs]
    if not fast_dev_run:
        callbacks.append(Savers(folder, epochs))
    trainer = _trainer(plan, folder, callbacks, fast_dev_run=fast_dev_run, progress=progress)
    try:
        trainer.fit(
            built.module,
            datamodule=Loaders(built.data, settings, built.inputs, seed),
            ckpt_path=None if old is None else old.checkpoint,
            weights_only=True,
        )
    except BaseException as error:
        interrupted = isinstance(epochs.stopped_by, KeyboardInterrupt)
        if epochs.run is not None:
            diverged = isinstance(error, DivergedError)
            status = "interrupted" if interrupted else "diverged" if diverged else "failed"
            epochs.run.finish(status=status)
        if interrupted and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if isinstance(error, MisconfigurationException):
            raise RunError(str(error).splitlines()[0]) from error
        raise
    measured = built.module.measured["val"]
    numbers = {name: measured[name] for name in ("acc1", "acc5", "ce", "ece")}
    loss = str(settings.spec())
    if epochs.run is None:
        return TrainResult(None, loss, 1, 1, **numbers)
    return finish(built, epochs.run, folder, loss)


def _seed(seed: int | None) -> int:
    """Seed everything; a drawn seed reaches other processes in Lightning's own variable."""
    if seed is None and is_first():
        seed = random.SystemRandom().randrange(2**31)
    return pl.seed_everything(seed, verbose=False)


def _trainer(
    plan: Plan, folder: Path, callbacks: list[Callback], *, fast_dev_run: bool, progress: bool
) -> pl.Trainer:
    settings = plan.settings
    if progress:
        callbacks.append(RichProgressBar())
    try:
        return pl.Trainer(
            accelerator=plan.accelerator,
            devices=plan.devices,
            strategy=settings.strategy,
            precision=settings.precision,  # type: ignore[arg-type]
            max_epochs=settings.epochs,
            accumulate_grad_batches=settings.grad_accum,
            gradient_clip_val=settings.clip_grad,
            deterministic=settings.seed is not None,
            callbacks=callbacks,
            logger=False,
            fast_dev_run=fast_dev_run,
            enable_checkpointing=not fast_dev_run,
            enable_progress_bar=progress,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise RunError(f"the trainer: {str(error).splitlines()[0]}") from error
