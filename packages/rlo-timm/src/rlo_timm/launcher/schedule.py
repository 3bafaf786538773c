"""`--loss-schedule SHAPE[:warmup=F,k_start=K]`: the loss's own schedule options, in a flag."""

from __future__ import annotations

from rlo_core.errors import SpecError
from rlo_core.registry import LossSpec, create_loss, parse_spec
from rlo_core.schedules import SHAPES, Schedule

_OPTIONS = ("warmup", "k_start")


def with_schedule(spec: LossSpec, schedule: str | None) -> LossSpec:
    """Return the spec with a schedule's options added.

    Args:
        spec: The loss, e.g. `rlo:k=8`.
        schedule: None, or a shape of `rlo_core.schedules` with its options, e.g.
            `cosine:warmup=0.3,k_start=20`. The warmup is the whole run where it is left out.

    Returns:
        E.g. `rlo:k=8,schedule=cosine,warmup=0.3,k_start=20`, the form that the loss itself takes.

    Raises:
        SpecError: no such shape or option, or an option that the spec gives with another value.
    """
    if schedule is None:
        return spec
    shape = parse_spec(schedule)
    if shape.name not in SHAPES:
        raise SpecError(f"schedule must be one of {', '.join(SHAPES)}, got {shape.name!r}")
    for key in shape.options:
        if key not in _OPTIONS:
            raise SpecError(f"schedule takes {' and '.join(_OPTIONS)}, got {key!r}")
    options = {"warmup": "1", **shape.options}
    return spec.with_options(schedule=shape.name, **options)


def is_scheduled(spec: LossSpec) -> bool:
    """Tell whether the loss has to be told how far the run is."""
    criterion = create_loss(spec)
    schedule = getattr(criterion, "schedule", None)
    if isinstance(schedule, Schedule):
        return schedule.warmup > 0
    return hasattr(criterion, "set_progress")
