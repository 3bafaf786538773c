"""ms-swift: `swift sft ... --external_plugins $(python -m rlo_hf.swift) --loss_type rlo:k=5`.

ms-swift imports the files of `--external_plugins` and looks `--loss_type` up in its `loss_map`.
Imported so, this module puts the losses there: every registered name, and the spec of the command
line. It also works from Python: `import rlo_hf.swift` before the trainer is made.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlo_hf.objective import Objective
from rlo_hf.tasks import shifted

_OPTION = ("--loss_type", "--loss-type")


def loss_of(spec: str) -> type:
    """Return a class for `loss_map`: made with (args, trainer), called with outputs and labels.

    Args:
        spec: The loss, with a link.

    Raises:
        SpecError: unknown loss, or one that this door cannot honour.
    """
    objective = Objective(spec)

    class SwiftLoss:
        """A rooted loss for ms-swift; `loss_scale` weighs the tokens."""

        def __init__(self, args: Any, trainer: Any) -> None:
            self.args, self.trainer = args, trainer
            template = getattr(trainer, "template", None)
            if getattr(template, "sequence_parallel_size", 1) > 1:
                from rlo_core.errors import RLOError

                raise RLOError(
                    "under ms-swift's sequence parallelism the loss is computed before it can be "
                    f"{spec!r}; use sequence_parallel_size=1"
                )

        def __call__(
            self,
            outputs: Any,
            labels: Tensor,
            *,
            num_items_in_batch: Any = None,
            loss_scale: Tensor | None = None,
            **kwargs: Any,
        ) -> Tensor:
            logits: Tensor = outputs.logits
            target = shifted(objective.canonical(labels)).to(logits.device).flatten()
            weights = None if loss_scale is None else loss_scale.flatten().to(logits.device)
            total = objective.total(logits.flatten(0, -2), target, weights=weights)
            count = objective.count(target) if num_items_in_batch is None else num_items_in_batch
            count = torch.as_tensor(count, device=total.device)
            return total / count.clamp(min=1)

    SwiftLoss.__name__ = SwiftLoss.__qualname__ = f"SwiftLoss[{spec}]"
    return SwiftLoss


def register(loss_map: dict[str, Any], arguments: Sequence[str]) -> list[str]:
    """Put our losses into ms-swift's table, and return the names that were added.

    Args:
        loss_map: `swift.loss.loss_map`.
        arguments: The command line; the value of its `--loss_type` is taken for a spec.

    Raises:
        SpecError: a `--loss_type` that neither ms-swift nor this package knows.
    """
    from rlo_core.registry import available_losses

    wanted = [after for word, after in itertools.pairwise(arguments)
              if word in _OPTION]  # fmt: skip
    wanted += [word.partition("=")[2] for word in arguments if word.startswith(_OPTION[0] + "=")]
    added = []
    for name in (*available_losses(), *wanted):
        if name not in loss_map:
            loss_map[name] = loss_of(name)
            added.append(name)
    return added


def _plug_in() -> None:
    from swift.loss import loss_map

    register(loss_map, sys.argv)


if __name__ == "__main__":
    print(__file__)
else:
    _plug_in()
