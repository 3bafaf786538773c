"""Losses with a schedule are told how far the run is."""

from __future__ import annotations

import math
from typing import Any

import transformers
from rlo_core.schedules import set_progress
from torch import nn

from rlo_hf.objective import Objective


class ScheduleCallback(transformers.TrainerCallback):
    """Calls `set_progress` on the criterion before every update.

    Args:
        objective: The trainer's loss.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the schedule to where the run is."""
        criterion = self.objective.criterion
        if isinstance(criterion, nn.Module) and state.max_steps > 0:
            set_progress(criterion, min(state.global_step / state.max_steps, 1.0))


def scheduled(objective: Objective) -> dict[str, float]:
    """Return the k in force as a record of a log; nothing without a schedule, or at k = inf."""
    criterion: Any = objective.criterion
    criterion = getattr(criterion, "criterion", criterion)  # behind gates
    if not getattr(getattr(criterion, "schedule", None), "warmup", 0.0):
        return {}
    return {"k": float(criterion.k)} if math.isfinite(criterion.k) else {}
