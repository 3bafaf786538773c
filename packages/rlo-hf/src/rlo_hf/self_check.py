"""The first training batch, checked: the loss that is propagated is the objective of its outputs.

A subclass, a script or another package can put a loss of its own in the place of ours, and nothing
would show but the numbers. So at the first batch the loss that reaches the backward pass is
compared with the objective, computed once more from the same outputs by plain operations.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rlo_core.errors import RLOError
from rlo_core.gates import RowStatistics, gate_factor, needs_of, row_statistics, top_of
from torch import Tensor, nn

from rlo_hf.objective import IGNORE_INDEX, Objective

_ROWS = 256
"""Rows of logits that the check holds in float32 at one time."""
_OWN = ("rlo_hf", "rlo_core", "transformers", "trl", "accelerate")
_METHODS = ("compute_loss", "training_step", "_prepare_inputs")


class SelfCheckError(RLOError):
    """The loss that is propagated is not the one that was asked for."""


@torch.no_grad()
def reference_total(
    objective: Objective,
    logits: Callable[[int, int], Tensor] | Tensor,
    target: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the objective summed over kept labels, float64, from its formula.

    Args:
        objective: The loss.
        logits: (..., C), or what makes rows `start` to `stop` of (N, C).
        target: The shape of `logits` without C, int64, -100 ignored; or floating, multi-label.
        weights: The shape of `target`, or None for ones.
    """
    if isinstance(logits, Tensor) and target.is_floating_point():
        return objective.binary_total(logits, target).double()
    labels, share = target.reshape(-1), None if weights is None else weights.reshape(-1)
    if objective.link is None:
        assert isinstance(logits, Tensor)
        total = objective.total(logits.flatten(0, -2), labels, weights=share)
        return total.detach().double()
    gates, losses, found = objective.gates, [], []
    for start in range(0, len(labels), _ROWS):
        y = labels[start : start + _ROWS]
        kept = y != IGNORE_INDEX
        if isinstance(logits, Tensor):
            part = logits.reshape(-1, logits.shape[-1])[start : start + _ROWS][kept].float()
        else:
            part = logits(start, start + len(y))[kept].float()
        loss = _row_loss(objective, part, y[kept])
        losses.append(loss if share is None else loss * share[start : start + _ROWS][kept].to(loss))
        if gates:
            names = needs_of(gates)
            found.append(row_statistics(part, y[kept], needs=names, top=top_of(gates)))
    if not losses:
        return torch.zeros((), dtype=torch.float64, device=labels.device)
    loss = torch.cat(losses)
    return (loss if not gates else loss * gate_factor(gates, _joined(found))).double().sum()


def _joined(parts: list[RowStatistics]) -> RowStatistics:
    names = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
    values: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in names
    }
    return RowStatistics(**values, classes=parts[0].classes)


def _row_loss(objective: Objective, logits: Tensor, target: Tensor) -> Tensor:
    link, smoothing = objective.link, objective.label_smoothing
    assert link is not None
    log_z, at = logits.logsumexp(1), target.unsqueeze(1)
    value = link.value(log_z - logits.gather(1, at).squeeze(1))
    scale = None if objective.weight is None else objective.weight.to(logits.device)
    value = value if scale is None else value * scale[target]
    if not smoothing:
        return value
    spread = link.value(log_z.unsqueeze(1) - logits)
    spread = spread if scale is None else spread * scale
    return (1.0 - smoothing) * value + smoothing * spread.mean(1)


class SelfCheck:
    """The check of one trainer.

    Args:
        objective: The loss.
        on: False leaves the check out.

    Attributes:
        pending: Whether the first batch is still to come.
        expected: What the loss slot says should be propagated; None until it is asked.
    """

    def __init__(self, objective: Objective, *, on: bool = True) -> None:
        self.objective = objective
        self.pending = on
        self.expected: Tensor | None = None
        self._outputs: Any = None

    def expect(self, total: Tensor, count: Tensor | float, extra: Tensor | float = 0.0) -> None:
        """Say what should be propagated: `total / count + extra`, before the processes' factor."""
        count = torch.as_tensor(count, device=total.device).double()
        self.expected = total / count.where(count != 0, 1.0) + extra

    @contextmanager
    def watching(
        self, host: Any, base: nn.Module, fallback: Callable[[Tensor], Tensor | None]
    ) -> Iterator[None]:
        """Compare the first loss that the block hands to `host.accelerator.backward`.

        Args:
            host: The Trainer.
            base: Its transformers model, whose outputs are looked at where the slot is passed by.
            fallback: Gives the expected loss from logits, None where their shape does not fit.
        """
        backward = host.accelerator.backward

        def keep(module: nn.Module, args: Any, outputs: Any) -> None:
            self._outputs = outputs

        def compared(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            host.accelerator.backward = backward
            if self.expected is None:
                logits = _logits(self._outputs)
                self.expected = None if logits is None else fallback(logits.detach())
            self._compare(host, loss)
            return backward(loss, *args, **kwargs)

        hook = base.register_forward_hook(keep)
        self.expected = None
        host.accelerator.backward = compared
        try:
            yield
        finally:
            hook.remove()
            host.accelerator.__dict__.pop("backward", None)
            self._outputs = self.expected = None
        self.pending = False

    def _compare(self, host: Any, loss: Tensor) -> None:
        if self.expected is None:
            raise SelfCheckError(
                f"the loss that is propagated is not {self.objective.name}: "
                f"{who_is_in_the_place(host, 'passes the loss slot by')}"
            )
        got, expected = float(loss.detach()), float(self.expected)
        if not _close(got, expected, exact=_is_exact(host)):
            raise SelfCheckError(
                f"the loss that is propagated is {got:.6g}, and {self.objective.name} of the same "
                f"outputs is {expected:.6g}: {who_is_in_the_place(host, 'has a loss of its own')}"
            )


class FirstStep(transformers.TrainerCallback):
    """Refuses the first update of a trainer whose own `training_step` was passed by."""

    def __init__(self, host: Any, check: SelfCheck) -> None:
        self.host, self.check = host, check

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise unless the batch of the update was checked."""
        if self.check.pending:
            name = self.check.objective.name
            raise SelfCheckError(
                f"the loss that is propagated is not {name}: "
                f"{who_is_in_the_place(self.host, 'passes the loss slot by')}"
            )


def watch_outputs(base: nn.Module, name: str, slot: Callable[[Any], bool]) -> None:
    """Check, once, that the gradient of a model's logits comes through the loss slot.

    For ways in that own no training step: at the first training forward, the first gradient that
    reaches the logits must have passed the loss that the slot returned.

    Args:
        base: The transformers model.
        name: Of the loss, for the message.
        slot: Whether the gradient of the slot's loss has been asked for, given the model (which
            may be a copy of `base`).
    """
    base._rlo_watched = False  # type: ignore[assignment]
    if getattr(base, "_rlo_watching", False):
        return
    base._rlo_watching = True  # type: ignore[assignment]

    def look(module: nn.Module, args: Any, outputs: Any) -> None:
        logits = _logits(outputs)
        if module._rlo_watched or not module.training:
            return
        if logits is None or not logits.requires_grad:
            return
        module._rlo_watched = True  # type: ignore[assignment]

        def arrived(grad: Tensor) -> None:
            if not slot(module):
                raise SelfCheckError(
                    f"the gradient that reaches the logits of {type(base).__name__} does not come "
                    f"from {name}: the training loop has a loss of its own; propagate the loss of "
                    "the model's output, or turn this check off with check=False"
                )

        logits.register_hook(arrived)  # type: ignore[no-untyped-call]

    base.register_forward_hook(look)


def compare_once(name: str, got: Tensor, expected: Tensor) -> None:
    """Raise SelfCheckError unless a slot's loss is the objective of its outputs."""
    exact = got.dtype in (torch.float32, torch.float64)
    if not _close(float(got.detach()), float(expected), exact=exact):
        raise SelfCheckError(
            f"the loss of the slot is {float(got.detach()):.6g}, and {name} of the same outputs is "
            f"{float(expected):.6g}; please report it, or turn this check off with check=False"
        )


def _logits(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    else:
        found = outputs[0] if isinstance(outputs, tuple) and outputs else None
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def _is_exact(host: Any) -> bool:
    model = next(host.model.parameters()).dtype
    return model in (torch.float32, torch.float64) and not (host.args.fp16 or host.args.bf16)


def _close(got: float, expected: float, *, exact: bool) -> bool:
    if got != got or expected != expected:  # a NaN is for the Trainer's own checks
        return True
    return abs(got - expected) <= (1e-3 if exact else 3e-2) * abs(expected) + 1e-6


def who_is_in_the_place(host: Any, what: str) -> str:
    """Say what stands in the way of the loss of a trainer, and the way out."""
    found = overrides(type(host))
    who = " and ".join(found) if found else f"something in {type(host).__name__}'s training step"
    return f"{who} {what}; call super() in it, or turn this check off with check=False (--no-check)"


def overrides(kind: type, *, after: type | None = None) -> list[str]:
    """Return what classes of others have in the place of the Trainer's step, with file and line.

    Args:
        kind: The class of a trainer.
        after: Look only at what stands behind this class in the order of resolution.
    """
    found = []
    start = 0 if after is None else kind.__mro__.index(after) + 1
    for cls in kind.__mro__[start:]:
        for name in _METHODS:
            code = getattr(cls.__dict__.get(name), "__code__", None)
            if code is None or _package_of(cls.__dict__[name]) in _OWN:
                continue
            where = f"{_short(code.co_filename)}, line {code.co_firstlineno}"
            found.append(f"{cls.__name__}.{name} ({where})")
    return found


def _package_of(function: Any) -> str:
    """The top package that the code of a function lies in, whatever module it claims to be of."""
    name = getattr(sys.modules.get(function.__module__), "__name__", "").partition(".")[0]
    module = sys.modules.get(name)
    root = getattr(module, "__file__", None)
    inside = root and Path(function.__code__.co_filename).is_relative_to(Path(root).parent)
    return name if inside else ""


def _short(path: str) -> str:
    """A path as a person would write it from here."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive
        return path
    return path if relative.startswith("..") else relative
