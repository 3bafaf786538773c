"""Everything that `rlo-timm train` decides; flags, YAML, Python and run.json have these names.

Imports no torch, so that `--help` and a misspelt option answer at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from rlo_core.errors import RLOError, SpecError

from rlo_timm.trainer.names import authors_loss, did_you_mean

if TYPE_CHECKING:
    from rlo_core.registry import LossSpec

SCHEDULERS = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "none")
CROPS = ("pad", "rrc", "rkrc", "rkrr")
STEMS = ("auto", "imagenet", "cifar")
CLIP_MODES = ("norm", "value", "agc")
LOGGERS = ("tensorboard", "wandb", "trackio")


class SettingsError(RLOError):
    """An option that does not exist, or a value that it cannot have."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainSettings:
    """The options of a run, with the authors' defaults.

    Every field is an option of `rlo-timm train` and a key of its YAML; `None` is "decided by the
    rest", and `rlo-timm train --print-config` prints what was decided.

    Raises:
        SettingsError: a value out of its range.

    Example:
        >>> str(TrainSettings(dataset="digits", net="res18", loss="root", k=8, m=10).spec())
        'rlo:k=8,m=10'
    """

    dataset: str = _option(
        "cifar10",
        "cifar10, cifar100, tiny-imagenet, food101, imagenet, digits; a folder of class folders or "
        "of parquet files; or a name of timm's (torch/, hfds/, hfids/, wds/, tfds/).",
    )
    data_dir: str = _option("data", "Where named data sets are, or are downloaded to.")
    train_split: str = _option("train", "Training split of a data set that timm opens.")
    val_split: str = _option("validation", "Validation split of a data set that timm opens.")
    num_classes: int | None = _option(None, "Classes, where the data set does not say it.")
    net: str = _option(
        "vit",
        "vgg, res18, res34, res50, res101, vit, vit_small, vit_large, vit_timm, cait, swin, "
        "swin_tiny, convmixer, mlpmixer, simplevit; any timm model; hf-hub:OWNER/NAME; "
        "local-dir:FOLDER.",
    )
    stem: str = _option(
        "auto", "First layers of a ResNet or VGG: imagenet, cifar, or auto (cifar below 128 px)."
    )
    loss: str = _option(
        "rlo",
        "Training loss, NAME or NAME:option=value,... (`rlo losses` lists them); auto compares "
        "some first, in at most 14 trainings, and takes the best.",
    )
    k: float | None = _option(None, "Root of a rooted loss (3 with the default loss).")
    m: float | None = _option(None, "Multiplier of a rooted loss (3 with the default loss).")
    loss_schedule: str | None = _option(
        None,
        "Move k over the run: linear, cosine, geometric or constant, e.g. cosine:warmup=0.3.",
    )
    size: int | None = _option(None, "Image side in pixels; the data set's own if left out.")
    epochs: int = _option(200, "Passes over the training images.")
    batch_size: int = _option(512, "Images a step, on each device.")
    grad_accum: int = _option(1, "Batches added up before each update.")
    opt: str = _option("adam", "Any optimiser of timm.")
    lr: float | None = _option(None, "Step size; 1e-3 for ResNets and 1e-4 otherwise if left out.")
    weight_decay: float = _option(0.0, "Weight decay.")
    momentum: float = _option(0.9, "Momentum of optimisers that have one.")
    layer_decay: float | None = _option(None, "Factor of the step size from layer to layer.")
    scheduler: str = _option("cosine", "cosine, tanh, step, multistep, plateau, poly or none.")
    sched_on_updates: bool = _option(False, "Move the step size each update, not each epoch.")
    min_lr: float = _option(0.0, "Step size at the end of the schedule.")
    warmup_epochs: int = _option(0, "Epochs of linear warmup.")
    warmup_lr: float = _option(1e-5, "Step size at the start of the warmup.")
    decay_epochs: float = _option(30.0, "Epochs between two decays (step).")
    decay_milestones: str = _option("30,60", "Epochs of the decays (multistep).")
    decay_rate: float = _option(0.1, "Factor of a decay (step, multistep, plateau), or the power.")
    patience_epochs: int = _option(10, "Epochs without a better one before a decay (plateau).")
    clip_grad: float | None = _option(None, "Largest gradient, as --clip-mode measures it.")
    clip_mode: str = _option("norm", "norm, value or agc.")
    smoothing: float = _option(0.0, "Label smoothing.")
    mixup: float = _option(0.0, "alpha of mixup.")
    cutmix: float = _option(0.0, "alpha of CutMix.")
    mixup_prob: float = _option(1.0, "Share of the batches that are mixed.")
    mixup_switch_prob: float = _option(0.5, "Share of CutMix where both are on.")
    augment: bool = _option(True, "Crop and flip the training images.")
    randaugment: bool = _option(False, "RandAugment, N=2, M=14, besides (the authors').")
    aa: str | None = _option(None, "AutoAugment policy of timm, e.g. rand-m9-mstd0.5-inc1.")
    train_crop_mode: str | None = _option(
        None, "pad (below 128 px), or timm's rrc (from there on), rkrc, rkrr."
    )
    hflip: float = _option(0.5, "Probability of a horizontal flip (0 for digits).")
    vflip: float = _option(0.0, "Probability of a vertical flip.")
    color_jitter: float = _option(0.0, "Strength of timm's colour jitter.")
    reprob: float = _option(0.0, "Probability of random erasing.")
    remode: str = _option("pixel", "Random erasing with const, rand or pixel.")
    interpolation: str | None = _option(None, "Of resizing; the network's own if left out.")
    crop_pct: float | None = _option(None, "Share of a validation image that is seen.")
    drop: float = _option(0.0, "Dropout.")
    drop_path: float = _option(0.0, "Stochastic depth.")
    pretrained: bool = _option(False, "Start from timm's weights, at their own image size.")
    finetune_from: str | None = _option(
        None, "Start from the weights of a run, a .safetensors or a .ckpt file."
    )
    model_ema: bool = _option(False, "Keep, measure and save a moving average of the weights.")
    model_ema_decay: float = _option(0.9998, "Decay of it, an update.")
    kd_model: str | None = _option(None, "Teacher to distil from: a timm model or a run folder.")
    task_loss_weight: float = _option(1.0, "Weight of the loss beside a teacher.")
    distill_loss_weight: float = _option(1.0, "Weight of the teacher's part.")
    kd_temperature: float = _option(1.0, "Temperature of the distillation.")
    train_limit: int | None = _option(None, "Use N training images, all classes alike.")
    val_limit: int | None = _option(None, "Use N validation images, all classes alike.")
    workers: int = _option(4, "Data loading processes.")
    download: bool = _option(True, "Let torchvision download a data set that is missing.")
    device: str = _option("auto", "auto, cpu, gpu, cuda, cuda:1, mps, ...")
    devices: int = _option(1, "How many devices.")
    strategy: str = _option("auto", "auto, ddp, or any strategy of Lightning.")
    precision: str = _option(
        "auto", "auto (mixed where the device has it), 32-true, bf16-mixed, 16-mixed, ..."
    )
    channels_last: bool = _option(False, "Keep images and weights in channels-last order.")
    compile: bool = _option(False, "torch.compile the network.")
    seed: int | None = _option(None, "Makes the run deterministic.")
    logger: str = _option(
        "tensorboard", "tensorboard, wandb, trackio, several with commas, or none."
    )
    wandb: bool = _option(False, "The same as --logger with wandb in it.")
    push: str | None = _option(None, "Hub repository, OWNER/NAME, that gets the best weights.")

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_choices()

    def _check_ranges(self) -> None:
        positive = ("epochs", "batch_size", "devices", "size", "train_limit", "val_limit")
        for name in (*positive, "grad_accum", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1, got {value}")
        counts = ("workers", "warmup_epochs", "weight_decay", "mixup", "cutmix", "min_lr")
        for name in (*counts, "color_jitter", "patience_epochs", "warmup_lr"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must be at least 0, got {getattr(self, name)}")
        shares = ("smoothing", "mixup_prob", "mixup_switch_prob", "hflip", "vflip", "reprob")
        for name in (*shares, "drop", "drop_path", "model_ema_decay", "momentum"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise SettingsError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("lr", "clip_grad", "decay_epochs", "kd_temperature", "layer_decay"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingsError(f"{name} must be positive, got {value}")
        if self.crop_pct is not None and not 0.0 < self.crop_pct <= 1.0:
            raise SettingsError(f"crop_pct must be in (0, 1], got {self.crop_pct}")
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise SettingsError(
                f"warmup_epochs must be less than epochs ({self.epochs}), got {self.warmup_epochs}"
            )

    def _check_choices(self) -> None:
        choices = {
            "scheduler": SCHEDULERS,
            "stem": STEMS,
            "clip_mode": CLIP_MODES,
            "remode": ("const", "rand", "pixel"),
        }
        if self.train_crop_mode is not None:
            choices["train_crop_mode"] = CROPS
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                listed = ", ".join(known)
                raise SettingsError(f"{name} must be one of {listed}, got {value!r}")
        if self.scheduler == "plateau" and self.sched_on_updates:
            raise SettingsError("scheduler 'plateau' moves each epoch; leave out sched_on_updates")
        if self.pretrained and self.finetune_from:
            raise SettingsError("pretrained and finetune_from exclude each other")
        if self.randaugment and self.aa:
            raise SettingsError("randaugment and aa exclude each other")
        self.milestones()
        self.loggers()

    def milestones(self) -> list[int]:
        """Return the epochs of `decay_milestones`."""
        try:
            return [int(part) for part in self.decay_milestones.split(",")]
        except ValueError:
            raise SettingsError(
                f"decay_milestones must be epochs with commas between, got "
                f"{self.decay_milestones!r}"
            ) from None

    def loggers(self) -> list[str]:
        """Return the loggers besides metrics.jsonl and metrics.csv."""
        names = [part.strip() for part in self.logger.split(",") if part.strip()]
        names = [] if names == ["none"] else names
        if self.wandb and "wandb" not in names:
            names.append("wandb")
        for name in names:
            if name not in LOGGERS:
                raise SettingsError(
                    f"logger must be of {', '.join(LOGGERS)}, or none, got {name!r}"
                )
        return names

    def spec(self) -> LossSpec:
        """Return the loss with k, m and the schedule in it.

        Raises:
            SpecError: k or m is given twice, or the schedule is none.
        """
        from rlo_core.registry import parse_spec

        from rlo_timm.launcher.schedule import with_schedule

        spec = parse_spec(authors_loss(self.loss))
        given = {key: v for key, v in (("k", self.k), ("m", self.m)) if v is not None}
        if str(spec) == "rlo" and not given:
            given = {"k": 3.0, "m": 3.0}
        try:
            return with_schedule(spec.with_options(**given), self.loss_schedule)
        except SpecError as error:
            raise SpecError(f"loss: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, source: str) -> TrainSettings:
        """Make settings from YAML or from a saved run.

        Args:
            mapping: Options by name, with `-` or `_`.
            source: What to call it in a message.

        Raises:
            SettingsError: an unknown name, or a value of another type.
        """
        hints = get_type_hints(cls)
        options: dict[str, Any] = {}
        for key, value in mapping.items():
            name = str(key).replace("-", "_")
            if name not in hints:
                close = did_you_mean(name, hints) or ";"
                raise SettingsError(
                    f"{source} has no option {key!r}{close} there are {', '.join(hints)}"
                )
            options[name] = _typed(name, value, hints[name], source)
        return cls(**options)


def _typed(name: str, value: Any, hint: Any, source: str) -> Any:
    """Return the value if it is of its option's type; 1, or `1e-3` in YAML, is a float too."""
    kinds = get_args(hint) or (hint,)
    if float in kinds and not isinstance(value, bool) and isinstance(value, (int, str)):
        try:
            return float(value)
        except ValueError:
            pass
    good = any(isinstance(value, kind) and not (kind is int and value is True) for kind in kinds)
    if not good or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("none" if k is type(None) else k.__name__ for k in kinds)
        raise SettingsError(f"{source}: {name} must be {wanted}, got {value!r}")
    return value
