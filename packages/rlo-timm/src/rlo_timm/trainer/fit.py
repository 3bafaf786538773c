"""`rlo-timm train` from settings to a finished run folder."""

from __future__ import annotations

import contextlib
import math
import os
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from rlo_core.errors import RunError
from rlo_core.files import atomic_path, write_text
from rlo_core.runs.record import RUN_FILE, Run, read_metrics, read_run
from rlo_core.runs.report import write_report

from rlo_timm.trainer.data import load_data, own_size
from rlo_timm.trainer.epochs import Loaders, RunLog
from rlo_timm.trainer.module import Classifier
from rlo_timm.trainer.nets import create_net, image_size
from rlo_timm.trainer.settings import Settings

CHECKPOINTS, WEIGHTS, CONFIG = "checkpoints", "model.safetensors", "config.yaml"
_KEPT_ON_RESUME = ("dataset", "net", "size")
"""What a resumed run may not change."""


def resumable(folder: Path) -> tuple[Settings, Path, int | None]:
    """Return the settings, the last checkpoint and the seed (also a drawn one) of a run.

    Raises:
        RunError: no run there, or one that did not finish an epoch.
    """
    document = read_run(folder)
    checkpoint = folder / CHECKPOINTS / "last.ckpt"
    if document.get("kind") != "timm train":
        raise RunError(f"{str(folder)!r} is a run of {document.get('kind')!r}, not of `timm train`")
    if not checkpoint.is_file():
        raise RunError(f"{str(folder)!r} cannot be resumed: it has no {CHECKPOINTS}/last.ckpt yet")
    options: Mapping[str, Any] = document["options"]
    settings = Settings.from_mapping(options, source=str(folder / RUN_FILE))
    return settings, checkpoint, document.get("seed")


def check_resumed(old: Settings, new: Settings, folder: Path) -> None:
    """Raise RunError where a resumed run would be another one."""
    for name in _KEPT_ON_RESUME:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise RunError(f"{str(folder)!r} was trained with {name}={before!r}, got {after!r}")


def fit(
    settings: Settings,
    out: Path,
    *,
    checkpoint: Path | None = None,
    seed: int | None = None,
    fast_dev_run: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, and return the summary.

    Writes `run.json`, `metrics.jsonl`, `config.yaml`, `metrics.csv`, TensorBoard's files,
    `checkpoints/best.ckpt` and `last.ckpt`, `model.safetensors` (the best weights, as timm names
    them) and `report.html`.

    Args:
        settings: The options.
        out: The run folder.
        checkpoint: The `last.ckpt` to go on from.
        seed: The seed of a run that goes on, where the settings have none.
        fast_dev_run: One batch of training and validation, and no files.
        progress: Show a progress bar.

    Raises:
        RLOError: the data, the network, the loss or the folder is not as it has to be.
        KeyboardInterrupt: the run was interrupted; `checkpoints/last.ckpt` is the last whole epoch.
    """
    settings.spec()
    seed = _seed(seed if settings.seed is None else settings.seed)
    side = image_size(settings.net, own_size(settings))
    data = load_data(settings, size=side, seed=seed)
    net = create_net(
        settings.net,
        classes=len(data.classes),
        size=side,
        pretrained=settings.pretrained and checkpoint is None,
        finetune_from=None if checkpoint else settings.finetune_from,
    )
    module = Classifier(net, settings, classes=len(data.classes))
    run = None
    # Processes that Lightning starts for ddp run this too: files are those of the first one.
    if not fast_dev_run and _is_first():
        write_text(out / CONFIG, yaml.safe_dump(settings.to_dict(), sort_keys=False))
        run = Run.create(
            out,
            kind="timm train",
            loss=str(settings.spec()),
            options=settings.to_dict(),
            seed=seed,
            data=data.describe(settings.dataset),
            resume=checkpoint is not None,
        )
    log = RunLog(run, seed)
    best, last = _savers(out)
    callbacks: list[Callback] = [log] if fast_dev_run else [log, best, last]
    trainer = _trainer(settings, out, callbacks, fast_dev_run=fast_dev_run, progress=progress)
    try:
        with warnings.catch_warnings():
            # With one process a DistributedSampler is only our seeded order.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            trainer.fit(
                module,
                datamodule=Loaders(data, settings, seed),
                ckpt_path=checkpoint,
                weights_only=True,
            )
    except BaseException as error:
        interrupted = isinstance(log.stopped_by, KeyboardInterrupt)
        if run is not None:
            run.finish(status="interrupted" if interrupted else "failed")
        if interrupted and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    if run is None or not trainer.is_global_zero:
        return {key: float(value) for key, value in trainer.callback_metrics.items()}
    return _finish(run, out, Path(best.best_model_path))


def _savers(out: Path) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """Return what saves the best epoch, and what saves each one.

    Two, because Lightning's `save_last` follows the best one: it skips an epoch that is no better.
    """
    folder = out / CHECKPOINTS
    best = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor="val_acc1",
        mode="max",
        enable_version_counter=False,
    )
    last = ModelCheckpoint(dirpath=folder, filename="last", enable_version_counter=False)
    return best, last


def _is_first() -> bool:
    """Tell whether this is the first process of a run that has several."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def _seed(seed: int | None) -> int:
    """Seed everything; a drawn seed reaches other processes in Lightning's own variable."""
    if seed is None and _is_first():
        seed = random.SystemRandom().randrange(2**31)
    return pl.seed_everything(seed, workers=True, verbose=False)


def _trainer(
    settings: Settings,
    out: Path,
    callbacks: list[Callback],
    *,
    fast_dev_run: bool,
    progress: bool,
) -> pl.Trainer:
    loggers: list[Logger] = [] if fast_dev_run else _loggers(settings, out)
    if loggers:
        callbacks.append(LearningRateMonitor(logging_interval="epoch"))
    if progress:
        callbacks.append(RichProgressBar())
    return pl.Trainer(
        accelerator=settings.device,
        devices=settings.devices,
        strategy=settings.strategy,
        precision=_precision(settings),
        max_epochs=settings.epochs,
        gradient_clip_val=settings.clip_grad,
        deterministic=settings.seed is not None,
        callbacks=callbacks,
        logger=loggers,
        fast_dev_run=fast_dev_run,
        enable_checkpointing=not fast_dev_run,
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        default_root_dir=out,
    )


def _loggers(settings: Settings, out: Path) -> list[Logger]:
    loggers: list[Logger] = [CSVLogger(out, name="csv")]
    with contextlib.suppress(ModuleNotFoundError):  # an extra: rlo-timm[tensorboard]
        loggers.append(TensorBoardLogger(out, name="", version="tensorboard"))
    if settings.wandb:
        from lightning.pytorch.loggers import WandbLogger

        try:
            loggers.append(WandbLogger(save_dir=str(out), project="rlo-timm", name=out.name))
        except ModuleNotFoundError as error:
            raise RunError("--wandb needs wandb: pip install 'rlo-timm[wandb]'") from error
    return loggers


def _precision(settings: Settings) -> Any:
    """Return mixed precision where the device has it: bfloat16, or float16 where it lacks that."""
    if settings.precision != "auto":
        return settings.precision
    if settings.device in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    return "32-true"


def _finish(run: Run, out: Path, best: Path) -> dict[str, Any]:
    """Write the best weights, the summary and the report."""
    from safetensors.torch import save_file

    # A checkpoint of an older run in the folder can be the best one.
    state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
    weights = {k.removeprefix("net."): v.contiguous() for k, v in state.items() if "net." in k[:4]}
    with atomic_path(out / WEIGHTS) as temporary:
        save_file(weights, temporary)
    epochs = [r for r in read_metrics(out) if r.get("split") == "val"]
    top = max(epochs, key=lambda r: float(r["acc1"]))
    summary: dict[str, Any] = {"epochs": int(epochs[-1]["epoch"]), "best_epoch": int(top["epoch"])}
    for name in ("acc1", "acc5", "ce", "ece"):
        value = float(top[name])
        summary[name] = round(value, 6) if math.isfinite(value) else value
    run.finish(**summary)
    write_report([out], out / "report.html")
    return summary
