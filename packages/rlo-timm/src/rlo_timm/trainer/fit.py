"""`rlo-timm train` from settings to a finished run folder."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import Logger
from rlo_core.errors import RunError
from rlo_core.files import write_text
from rlo_core.runs.record import METRICS_FILE, RUN_FILE, Run, read_metrics, read_run
from rlo_core.runs.report import write_report
from torch import nn

from rlo_timm.trainer.callbacks import CHECKPOINTS, METRICS_CSV, Epochs, Savers
from rlo_timm.trainer.data import Data, load_data
from rlo_timm.trainer.evaluate import open_model
from rlo_timm.trainer.loaders import Inputs, Loaders, inputs_of
from rlo_timm.trainer.loggers import make_loggers
from rlo_timm.trainer.module import Classifier, DivergedError
from rlo_timm.trainer.names import HUB_PREFIXES, dataset_name, net_name
from rlo_timm.trainer.nets import architecture, create_net
from rlo_timm.trainer.plan import Plan, make_plan
from rlo_timm.trainer.publish import MODEL_CONFIG, WEIGHTS, describe_inputs, push, save_model
from rlo_timm.trainer.settings import TrainSettings

CONFIG, REPORT = "config.yaml", "report.html"
_WRITTEN = (RUN_FILE, METRICS_FILE, METRICS_CSV, CONFIG, WEIGHTS, MODEL_CONFIG, REPORT)
_WRITTEN_FOLDERS = (CHECKPOINTS, "tensorboard")
_KEPT_ON_RESUME = ("dataset", "net", "opt")
"""What a resumed run may not change."""

_logger = logging.getLogger("rlo_timm")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; the numbers are of its best epoch, on the validation images.

    Args:
        run: The run folder; None for `fast_dev_run`.
        loss: The spec of the training loss.
        epochs: How many there are.
        best_epoch: The first one of the highest top-1, counted from 1.
        acc1: Share of images whose class comes first.
        acc5: Share whose class is among the first five.
        ce: Cross entropy in nats.
        ece: Expected calibration error, 15 bins.
    """

    run: Path | None
    loss: str
    epochs: int
    best_epoch: int
    acc1: float
    acc5: float
    ce: float
    ece: float


@dataclass(frozen=True)
class Resumed:
    """A run to go on with: its settings, its last checkpoint, its seed, the epochs that it has."""

    folder: Path
    settings: TrainSettings
    checkpoint: Path
    seed: int | None
    epochs: int


def resumable(folder: str | os.PathLike[str]) -> Resumed:
    """Return what is needed to go on with a run.

    Raises:
        RunError: no run there, one that did not finish an epoch, or a checkpoint that is broken.
    """
    folder = Path(folder)
    document = read_run(folder)
    checkpoint = folder / CHECKPOINTS / "last.ckpt"
    if document.get("kind") != "timm train":
        raise RunError(f"{str(folder)!r} is a run of {document.get('kind')!r}, not of `timm train`")
    if not checkpoint.is_file():
        raise RunError(f"{str(folder)!r} cannot be resumed: it has no {CHECKPOINTS}/last.ckpt yet")
    options: Mapping[str, Any] = document["options"]
    settings = TrainSettings.from_mapping(options, source=str(folder / RUN_FILE))
    try:
        epochs = int(torch.load(checkpoint, map_location="cpu", weights_only=True)["epoch"]) + 1
    except Exception as error:  # a broken file raises whatever its bytes lead to
        raise RunError(f"{str(checkpoint)!r} is no checkpoint of a run: {error}") from error
    return Resumed(folder, settings, checkpoint, document.get("seed"), epochs)


def check_resumed(old: Resumed, new: TrainSettings) -> None:
    """Raise RunError where a resumed run would be another one; warn where its loss is another.

    `new` may be as given; names are compared as the run has them.
    """
    folder = str(old.folder)
    named = {"dataset": dataset_name(new.dataset), "net": net_name(new.net), "opt": new.opt}
    for name in _KEPT_ON_RESUME:
        before = getattr(old.settings, name)
        if before != named[name]:
            raise RunError(f"{folder!r} was trained with {name}={before!r}, got {named[name]!r}")
    if new.size is not None and old.settings.size != new.size:
        raise RunError(f"{folder!r} was trained with size={old.settings.size!r}, got {new.size!r}")
    if new.epochs <= old.epochs:
        raise RunError(
            f"{folder!r} has {old.epochs} epochs already; --epochs {old.epochs + 1} or more goes on"
        )
    before, now = str(old.settings.spec()), str(new.spec())
    if before != now:
        _logger.warning("%s was trained with loss '%s'; it goes on with '%s'", folder, before, now)


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
            diverged. A run that cannot start leaves no folder, and a resumed one as it was.
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
    old = None if resume is None else resumable(resume)
    if settings is None:
        settings = TrainSettings() if old is None else old.settings
    if old is not None:
        check_resumed(old, settings)
    plan = make_plan(settings)
    folder = _folder(plan.settings, out, old)
    if (not fast_dev_run and old is None and not overwrite and _is_first()) or (
        old is not None and folder != old.folder and not overwrite and _is_first()
    ):
        _check_free(folder)
    with _quiet():
        return _fit(plan, folder, old, fast_dev_run=fast_dev_run, progress=progress)


def _folder(
    settings: TrainSettings, out: str | os.PathLike[str] | None, old: Resumed | None
) -> Path:
    if out is not None:
        return Path(out)
    if old is not None:
        return old.folder
    name = settings.net.replace(":", "-").replace("/", "-")
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            f"{str(folder)!r} is there already; --overwrite replaces the run in it, "
            f"--resume {folder} goes on with it"
        )


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


@dataclass(frozen=True)
class _Built:
    """What a run is made of."""

    plan: Plan
    data: Data
    inputs: Inputs
    module: Classifier


def _build(plan: Plan, old: Resumed | None, seed: int, *, progress: bool) -> _Built:
    settings = plan.settings
    assert settings.size is not None
    data = load_data(settings, seed=seed)
    net = create_net(
        settings.net,
        classes=len(data.classes),
        size=settings.size,
        stem=settings.stem,
        pretrained=settings.pretrained and old is None,
        finetune_from=None if old else settings.finetune_from,
        drop=settings.drop,
        drop_path=settings.drop_path,
    )
    inputs = inputs_of(settings, data, net, settings.size)
    describe_inputs(net, inputs)
    if settings.channels_last:
        net = net.to(memory_format=torch.channels_last)
    teacher = None if settings.kd_model is None else _teacher(settings, len(data.classes))
    module = Classifier(
        net, settings, classes=len(data.classes), teacher=teacher, show_loss=progress
    )
    if settings.compile:
        net.compile()
    return _Built(plan, data, inputs, module)


def _teacher(settings: TrainSettings, classes: int) -> nn.Module:
    assert settings.kd_model is not None
    assert settings.size is not None
    if Path(settings.kd_model).is_dir() or settings.kd_model.startswith(HUB_PREFIXES):
        teacher = open_model(settings.kd_model)
    else:
        teacher = create_net(
            settings.kd_model, classes=classes, size=settings.size, pretrained=True
        )
    if teacher.num_classes != classes:
        raise RunError(
            f"kd_model {settings.kd_model!r} has {teacher.num_classes} classes, the data {classes}"
        )
    return teacher.eval()


def _fit(
    plan: Plan, folder: Path, old: Resumed | None, *, fast_dev_run: bool, progress: bool
) -> TrainResult:
    settings = plan.settings
    kept = old.seed if old is not None else None
    seed = _seed(kept if settings.seed is None else settings.seed)
    built = _build(plan, old, seed, progress=progress)
    if plan.stem is not None and _is_first():
        other = "imagenet" if plan.stem == "cifar" else "cifar"
        _logger.info(
            "net %s with the %s stem, for images of %s px; --stem %s takes the other",
            settings.net, plan.stem, settings.size, other,
        )  # fmt: skip
    begin = None
    if not fast_dev_run and _is_first():
        begin = _Begin(built, folder, old, seed)
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
    return _finish(built, epochs.run, folder, loss)


class _Begin:
    """Opens the run folder, once everything else stands."""

    def __init__(self, built: _Built, folder: Path, old: Resumed | None, seed: int) -> None:
        self.built, self.folder, self.old, self.seed = built, folder, old, seed

    def __call__(self) -> tuple[Run, list[Logger]]:
        settings = self.built.plan.settings
        if self.old is None:
            _clear(self.folder)
        else:
            self._take_over(self.old)
        (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_text(self.folder / CONFIG, yaml.safe_dump(settings.to_dict(), sort_keys=False))
        assert settings.size is not None
        run = Run.create(
            self.folder,
            kind="timm train",
            loss=str(settings.spec()),
            options=settings.to_dict(),
            seed=self.seed,
            data=self.built.data.describe(settings.dataset, settings.size),
            resume=self.old is not None,
        )
        return run, make_loggers(settings, self.folder)

    def _take_over(self, old: Resumed) -> None:
        """Keep the lines of the epochs that the checkpoint has, and no others."""
        records = [r for r in read_metrics(old.folder) if int(r["epoch"]) <= old.epochs]
        text = "".join(json.dumps(record) + "\n" for record in records)
        if self.folder != old.folder:
            _clear(self.folder)
            (self.folder / CHECKPOINTS).mkdir(parents=True)
            for name in ("best.ckpt", "last.ckpt"):
                shutil.copyfile(old.folder / CHECKPOINTS / name, self.folder / CHECKPOINTS / name)
        write_text(self.folder / METRICS_FILE, text)


def _clear(folder: Path) -> None:
    """Remove what a run in the folder has written, and nothing else."""
    for name in _WRITTEN:
        (folder / name).unlink(missing_ok=True)
    for name in _WRITTEN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _is_first() -> bool:
    """Tell whether this is the first process of a run that has several."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def _seed(seed: int | None) -> int:
    """Seed everything; a drawn seed reaches other processes in Lightning's own variable."""
    if seed is None and _is_first():
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


def _finish(built: _Built, run: Run, folder: Path, loss: str) -> TrainResult:
    """Write the best weights, the summary and the report."""
    settings = built.plan.settings
    checkpoint = torch.load(
        folder / CHECKPOINTS / "best.ckpt", map_location="cpu", weights_only=True
    )
    prefix = "ema.module." if settings.model_ema else "net."
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    best = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    assert settings.size is not None
    name, options = architecture(settings.net, settings.size, settings.stem)
    # A network of its own: the trained one may be compiled, on a device, in half precision.
    net = timm.create_model(name, num_classes=len(built.data.classes), **options)
    describe_inputs(net, built.inputs)
    net.load_state_dict(best)
    save_model(net, folder, inputs=built.inputs, options=options, classes=list(built.data.classes))
    epochs = [r for r in read_metrics(folder) if r.get("split") == "val"]
    top = max(epochs, key=lambda r: float(r["acc1"]))
    numbers = {name: float(top[name]) for name in ("acc1", "acc5", "ce", "ece")}
    summary: dict[str, Any] = {"epochs": int(epochs[-1]["epoch"]), "best_epoch": int(top["epoch"])}
    run.finish(**summary | {k: round(v, 6) if math.isfinite(v) else v for k, v in numbers.items()})
    write_report([folder], folder / REPORT)
    if settings.push:
        push(folder, settings.push)
    return TrainResult(folder, loss, summary["epochs"], summary["best_epoch"], **numbers)
