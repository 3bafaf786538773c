"""What the statements injected into train.py call: options, their check, the criterion, progress.

Imported by the user's script after its own imports, so that the timm in use is the user's.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rlo_core.errors import SpecError
from rlo_core.launch import ScriptError
from rlo_core.registry import (
    LossSpec,
    available_losses,
    create_binary_loss,
    create_loss,
    parse_spec,
)
from rlo_core.schedules import set_progress
from torch import nn

from rlo_timm._compat import AbbreviatingParser, actions_of
from rlo_timm.launcher.check import check_first_batch, kept
from rlo_timm.launcher.criteria import counterpart
from rlo_timm.launcher.schedule import is_scheduled, with_schedule
from rlo_timm.trainer.names import authors_loss

CHECK_FLAG = "--rlo-check"

_logger = logging.getLogger("rlo_timm")


class _Unabbreviated(AbbreviatingParser):
    """A parser for which some options have no abbreviations, so that the others keep theirs."""

    unabbreviated: frozenset[str] = frozenset()

    def option_tuples(self, option_string: str) -> list[Any]:
        found = super().option_tuples(option_string)
        return [f for f in found if not self.unabbreviated.intersection(f[0].option_strings)]


class _Choices:
    """The script's own choices of `--loss`, and every spec of ours besides."""

    def __init__(self, own: Iterable[Any]) -> None:
        self.own = list(own)

    def __contains__(self, value: object) -> bool:
        return value in self.own or _is_ours(value, self.own)

    def __iter__(self) -> Any:
        return iter(self.own)


def _is_ours(value: object, own: Iterable[Any] | None) -> bool:
    """Tell whether the script's own `--loss` was given a loss of ours.

    Where the script lists its choices, that is any registered name that it does not list; where it
    does not, a name that begins with `rlo` or a spec with options.
    """
    if not isinstance(value, str):
        return False
    name = authors_loss(value).partition(":")[0].strip()
    if own is None:
        return name.startswith("rlo") or (":" in value and name in available_losses())
    return name not in list(own) and name in available_losses()


class Slot:
    """The loss slot of one train.py.

    Args:
        progress: Whether the script's loops tell `epoch` and `batch`, as schedules need.
        found: Where in the script the loss is taken, for `--rlo-check`.
    """

    def __init__(self, *, progress: bool, found: str = "") -> None:
        self._progress = progress
        self._found = found
        self._flag = "--loss"
        self._dest = "loss"
        self._schedule_flag = "--loss-schedule"
        self._host_loss: argparse.Action | None = None
        self._host_default: Any = None
        self._scheduled: nn.Module | None = None
        self._epoch, self._epochs = 0, 1

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add `--loss` and `--loss-schedule`; `--rlo-loss` where the script has a `--loss`.

        Their default is no attribute at all: without them `args`, and so args.yaml and the
        checkpoints, are what they would have been.
        """
        self._register_models()
        taken = {flag: action for action in actions_of(parser) for flag in action.option_strings}
        dests = {action.dest for action in actions_of(parser)}
        self._host_loss = taken.get("--loss")
        if self._host_loss is not None or "loss" in dests:
            self._flag, self._dest = "--rlo-loss", "rlo_loss"
        if "--loss-schedule" in taken or "loss_schedule" in dests:
            self._schedule_flag = "--rlo-loss-schedule"
        host = self._host_loss
        self._host_default = None if host is None else host.default
        if host is not None and host.choices is not None:
            host.choices = _Choices(host.choices)
        group = parser.add_argument_group("Rooted logistic objectives (rlo-timm)")
        group.add_argument(
            self._flag,
            default=argparse.SUPPRESS,
            metavar="SPEC",
            help="training loss: a registered loss, NAME or NAME:option=value,..., e.g. rlo, "
            "rlo:k=8,m=10, rlo-convex:k=2; `rlo losses` lists them. Validation stays cross entropy",
        )
        group.add_argument(
            self._schedule_flag,
            default=argparse.SUPPRESS,
            metavar="SHAPE",
            help="move k over the run: linear, cosine, geometric or constant, with options, e.g. "
            "cosine:warmup=0.3,k_start=20 (default warmup: 1, the whole run; k_start: inf)",
        )
        group.add_argument(
            CHECK_FLAG,
            action="store_true",
            default=argparse.SUPPRESS,
            help="print where the loss is taken, what it replaces, and the weight that each sample "
            "of the first batch gets, then stop",
        )
        ours = frozenset({self._flag, self._schedule_flag, CHECK_FLAG})
        kind = type(parser)
        parser.__class__ = type(kind.__name__, (_Unabbreviated, kind), {"unabbreviated": ours})

    @staticmethod
    def _register_models() -> None:
        """Make the models of the built-in trainer known to the script's timm, if it is recent."""
        try:
            import rlo_timm.models  # noqa: F401
        except ImportError as error:  # an old checkout: its own models are there all the same
            _logger.debug("models of rlo-timm are not available here: %s", error)

    def check(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        """Refuse a bad spec as argparse refuses, and leave the canonical string in `args`."""
        if self._host_loss is not None:
            self._take_from_host(args)
        schedule_dest = self._schedule_flag[2:].replace("-", "_")
        if getattr(args, self._dest, None) is None:
            for flag, dest in ((self._schedule_flag, schedule_dest), (CHECK_FLAG, "rlo_check")):
                if getattr(args, dest, None) not in (None, False):
                    parser.error(f"argument {flag}: needs {self._flag}")
            return
        try:
            spec = parse_spec(authors_loss(getattr(args, self._dest)))
            setattr(args, self._dest, str(spec))
            spec = self._spec(args)
            self._check_paths(spec, args)
        except SpecError as error:
            parser.error(f"argument {self._flag}: {error}")
        if is_scheduled(spec) and not self._progress:
            raise ScriptError(
                f"loss '{spec}' has a schedule, and this script's progress is not recognised: "
                "looked for one `for epoch in range(...)` in main() and one `for batch_idx, ... in "
                "enumerate(loader)` in train_one_epoch() or train_epoch()"
            )

    def _take_from_host(self, args: argparse.Namespace) -> None:
        """Move a spec of ours out of the script's own `--loss`, which gets its default back."""
        host = self._host_loss
        assert host is not None
        value = getattr(args, host.dest, None)
        own = host.choices.own if isinstance(host.choices, _Choices) else None
        if _is_ours(value, own):
            setattr(args, self._dest, value)
            # A default that is ours came from YAML, over the script's own.
            default = self._host_default if _is_ours(host.default, own) else host.default
            setattr(args, host.dest, default)

    def _spec(self, args: argparse.Namespace) -> LossSpec:
        schedule = getattr(args, self._schedule_flag[2:].replace("-", "_"), None)
        return with_schedule(parse_spec(getattr(args, self._dest)), schedule)

    @staticmethod
    def _check_paths(spec: LossSpec, args: argparse.Namespace) -> None:
        """Make the criterion that the script's flags will ask for, to hear now what it refuses."""
        mixup = any(getattr(args, name, None) for name in ("mixup", "cutmix", "cutmix_minmax"))
        smoothing = 0.0 if mixup else float(getattr(args, "smoothing", 0.0) or 0.0)
        binary = getattr(args, "bce_loss", False) or getattr(args, "loss", None) == "bce"
        binary = binary or getattr(args, "task", None) == "multilabel"
        # As train.py has it: bce without smoothing or mixup is plain cross entropy in old releases.
        if binary:
            create_binary_loss(spec)
        create_loss(spec, label_smoothing=0.0 if binary else smoothing)

    def criterion(self, train_loss_fn: Any, args: argparse.Namespace) -> Any:
        """Return the criterion to train with: the script's own where `--loss` was not given."""
        if getattr(args, self._dest, None) is None:
            return train_loss_fn
        spec = self._spec(args)
        name = type(train_loss_fn).__name__
        checking = bool(getattr(args, "rlo_check", False))
        host = kept(train_loss_fn) if checking else train_loss_fn
        ours = counterpart(train_loss_fn, spec)
        if is_scheduled(spec):
            self._scheduled = ours
            # Where a release compiles the task with its criterion, k would be a constant there.
            inner = ours.cross_entropy_loss if name == "JsdCrossEntropy" else ours
            inner.forward = torch.compiler.disable(inner.forward)  # type: ignore
        if int(getattr(args, "rank", None) or getattr(args, "local_rank", None) or 0) == 0:
            _logger.info("training loss: %s, in place of %s", spec, name)
            self._compare_with_resumed(args)
        return check_first_batch(ours, host, str(spec), self._found) if checking else ours

    def task(self, task: Any, args: argparse.Namespace) -> None:
        """Replace the criterion of a `timm.task`, before it is compiled or distributed."""
        if getattr(args, self._dest, None) is not None:
            task.criterion = self.criterion(task.criterion, args)

    def _compare_with_resumed(self, args: argparse.Namespace) -> None:
        """Warn when a resumed run goes on with another loss than it began with."""
        resumed = getattr(args, "resume", None)
        if resumed == "auto":  # timm 1.0.30: the experiment's own last checkpoint
            own = [getattr(args, name, None) or "" for name in ("output", "experiment")]
            resumed = str(Path(*own, "last.pth.tar"))
        saved = Path(resumed).parent / "args.yaml" if resumed else None
        if saved is None or not saved.is_file():
            return
        import yaml

        before = yaml.safe_load(saved.read_text(encoding="utf-8")) or {}
        old, new = before.get(self._dest), getattr(args, self._dest)
        if old != new:
            was = "timm's own loss" if old is None else f"loss '{old}'"
            _logger.warning("%s was trained with %s; it goes on with '%s'", resumed, was, new)

    def epoch(self, epoch: int, epochs: int) -> None:
        """Take note of the epoch that begins."""
        self._epoch, self._epochs = epoch, max(1, epochs)

    def batch(self, batch: int, batches: int) -> None:
        """Move a scheduled loss to where the script is."""
        if self._scheduled is not None:
            done = (self._epoch + batch / max(1, batches)) / self._epochs
            set_progress(self._scheduled, min(1.0, done))
