"""Everything that `rlo-timm train` decides; flags, YAML and run.json have these names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from rlo_core.errors import RLOError, SpecError
from rlo_core.registry import LossSpec, parse_spec

from rlo_timm.launcher.schedule import with_schedule

AUTHORS_NAMES = {"root": "rlo"}
"""Names of losses in the authors' train.py, and ours."""


class SettingsError(RLOError):
    """An option that does not exist, or a value that it cannot have."""


@dataclass(frozen=True)
class Settings:
    """The options of a run, with the authors' defaults.

    Args:
        dataset: cifar10, cifar100, tiny-imagenet, food101, imagenet, digits, or a path to a folder
            of
            class folders or of parquet files.
        data_dir: Where named data sets are, and where torchvision downloads to.
        net: A name of the authors' (vgg, res18, vit, swin, ...) or any timm model.
        loss: A spec; k and m beside a rooted loss become part of it.
        k: Root. With the default loss 3, the authors'.
        m: Multiplier. With the default loss 3, the authors'.
        loss_schedule: As `--loss-schedule` of the launcher.
        size: Image side in pixels; None for the data set's own.
        epochs: Number of passes over the training images.
        batch_size: Images a step, on each device.
        opt: Any optimiser of timm.
        lr: Step size; None for 1e-3 with a ResNet and 1e-4 otherwise, the authors'.
        weight_decay: Of the optimiser.
        scheduler: "cosine" to 0 over the run, stepped each epoch, or "none".
        warmup_epochs: Epochs of linear warmup before it.
        clip_grad: Largest gradient norm; None for no clipping.
        smoothing: Label smoothing in [0, 1].
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        augment: Crop and flip the training images (crop alone for digits).
        randaugment: RandAugment with N=2, M=14 besides.
        pretrained: Start from timm's weights of the model.
        finetune_from: A .safetensors or .ckpt file whose weights to start from; a head of another
            size is left out.
        train_limit: Use only this many training images, the first ones; None for all.
        val_limit: The same for validation.
        workers: Data loading processes.
        download: Let torchvision download what is missing.
        device: "auto", "cpu", "gpu", "mps" or any accelerator of Lightning.
        devices: How many.
        strategy: "auto", "ddp" or any strategy of Lightning.
        precision: "auto" (mixed where the device has it) or any precision of Lightning.
        seed: Makes the run deterministic; None draws one.
        wandb: Log to Weights & Biases too.
    """

    dataset: str = "cifar10"
    data_dir: str = "data"
    net: str = "vit"
    loss: str = "rlo"
    k: float | None = None
    m: float | None = None
    loss_schedule: str | None = None
    size: int | None = None
    epochs: int = 200
    batch_size: int = 512
    opt: str = "adam"
    lr: float | None = None
    weight_decay: float = 0.0
    scheduler: str = "cosine"
    warmup_epochs: int = 0
    clip_grad: float | None = None
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: bool = True
    randaugment: bool = False
    pretrained: bool = False
    finetune_from: str | None = None
    train_limit: int | None = None
    val_limit: int | None = None
    workers: int = 4
    download: bool = True
    device: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    precision: str = "auto"
    seed: int | None = None
    wandb: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "devices", "size", "train_limit", "val_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1, got {value}")
        for name in ("workers", "warmup_epochs", "weight_decay", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0.0 <= self.smoothing <= 1.0:
            raise SettingsError(f"smoothing must be in [0, 1], got {self.smoothing}")
        if self.lr is not None and not self.lr > 0:
            raise SettingsError(f"lr must be positive, got {self.lr}")
        if self.scheduler not in ("cosine", "none"):
            raise SettingsError(f"scheduler must be 'cosine' or 'none', got {self.scheduler!r}")
        if self.pretrained and self.finetune_from:
            raise SettingsError("pretrained and finetune_from exclude each other")

    def spec(self) -> LossSpec:
        """Return the loss with k, m and the schedule in it.

        Raises:
            SpecError: k or m is given twice, or the schedule is none.
        """
        name, colon, rest = self.loss.partition(":")
        spec = parse_spec(AUTHORS_NAMES.get(name.strip(), name) + colon + rest)
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
    def from_mapping(cls, mapping: Mapping[str, Any], *, source: str) -> Settings:
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
                known = ", ".join(hints)
                raise SettingsError(f"{source} has no option {key!r}; there are {known}")
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
