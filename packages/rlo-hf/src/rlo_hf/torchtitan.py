"""torchtitan: `loss=RootedLoss.Config(spec="rlo:k=5")` in a model's configuration.

Inside its `ChunkedLossWrapper` too, which hands a chunk of the logits at a time to a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlo_core.errors import RLOError
from rlo_core.registry import create_loss
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import BaseLoss


class RootedLoss(BaseLoss):  # type: ignore[misc]
    """Any loss of the family, summed over tokens; torchtitan divides by the tokens of all ranks.

    Raises:
        SpecError: unknown loss, option or value.
        RLOError: logits that are sharded over the vocabulary (tensor parallelism).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        """The loss's place in a configuration."""

        spec: str = "rlo"
        """The loss."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.fn = summed(config.spec)
        self._maybe_compile(compile_config)


def summed(spec: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss summed over the tokens of (B, T, V) logits and (B, T) labels."""
    criterion = create_loss(spec, reduction="sum")

    def loss(pred: Tensor, labels: Tensor) -> Tensor:
        if isinstance(pred, DTensor):
            raise RLOError(
                f"loss {spec!r} takes whole logits, and tensor parallelism shards them over the "
                "vocabulary; turn loss parallelism off, or use tensor_parallel_degree=1"
            )
        total: Tensor = criterion(pred.flatten(0, 1).float(), labels.flatten())
        return total

    return loss
