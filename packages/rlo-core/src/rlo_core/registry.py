"""From a spec string to a criterion, through entry points.

`NAME` or `NAME:option=value,option=value` is the one form in which a loss is named: in a flag, in
YAML, in Python, in a saved run and in a message. A package adds a loss with an entry point in the
group `rlo_core.losses` that names a factory: a callable with explicit keyword options that returns
a module called `loss(logits, target)`. Listing reads package metadata only; a name is imported when
it is asked for, alone.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any

from rlo_core.errors import PluginError, SpecError
from rlo_core.plugins import LOSSES, find_plugins, load_plugin, package_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlo_core.links import Link
    from rlo_core.modules import BinaryLinkLoss

COMMON_OPTIONS = ("weight", "ignore_index", "label_smoothing", "reduction")
"""What the host sets, not the spec; a factory takes those that it can honour."""

Value = float | int | bool | str | None


@dataclass(frozen=True)
class LossSpec:
    """A parsed spec: `str(spec)` is the canonical string."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    gates: tuple[LossSpec, ...] = ()
    terms: tuple[LossSpec, ...] = ()

    def __str__(self) -> str:
        inside = ",".join(f"{key}={value}" if key else value for key, value in self.options.items())
        own = f"{self.name}:{inside}" if inside else self.name
        return "+".join(["*".join([own, *map(str, self.gates)]), *map(str, self.terms)])

    def with_options(self, **options: object) -> LossSpec:
        """Return the spec with options added; one already there with another value is an error."""
        merged = dict(self.options)
        for key, value in options.items():
            text = f"{value:g}" if isinstance(value, float) else str(value)
            if merged.setdefault(key, text) != text:
                raise SpecError(
                    f"option {key!r} is given twice, as {merged[key]} in '{self}' and as {text}"
                )
        return LossSpec(self.name, merged, self.gates, self.terms)


def parse_spec(spec: str | LossSpec) -> LossSpec:
    """Parse `NAME[:option=value,...][*GATE[:...]]...[+TERM[:...]]...`; looks no name up.

    Raises:
        SpecError: the string is not of that form.
    """
    if isinstance(spec, LossSpec):
        return spec
    if not isinstance(spec, str):
        raise SpecError(f"loss must be a spec string such as 'rlo:k=8,m=10', got {spec!r}")
    product, *terms = re.split(r"\+(?=\s*[A-Za-z])", spec)  # the + of 1e+5 is none of ours
    first, *gates = product.split("*")
    own = _parse_term(first, spec, gate=False)
    return LossSpec(
        own.name,
        own.options,
        tuple(_parse_term(gate, spec, gate=True) for gate in gates),
        tuple(_parse_term(term, spec, gate=True) for term in terms),
    )


def _parse_term(term: str, spec: str, *, gate: bool) -> LossSpec:
    """Parse one loss or gate; the first option of a gate may come without its name."""
    name, colon, rest = term.strip().partition(":")
    options: dict[str, str] = {}
    for number, part in enumerate(rest.split(",") if colon else ()):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if gate and number == 0 and key and not equals:
            key, equals, value = "", "=", key
            options[key] = value
            continue
        if not key or not equals or not value:
            raise SpecError(f"loss spec must be NAME or NAME:option=value,..., got {spec!r}")
        if key in options:
            raise SpecError(f"loss spec {spec!r} gives option {key!r} twice")
        options[key] = value
    if not name.strip():
        raise SpecError(f"loss spec must be NAME or NAME:option=value,..., got {spec!r}")
    return LossSpec(name.strip(), options)


def available_losses() -> dict[str, str]:
    """Return every registered name and the `package version` it comes from; imports no plugin."""
    return {
        name: " and ".join(map(package_of, entries))
        for name, entries in find_plugins(LOSSES).items()
    }


def load_factory(name: str) -> Callable[..., nn.Module]:
    """Import and return the factory of one registered loss.

    Raises:
        SpecError: no such name (with a suggestion).
        PluginError: two packages claim it, or it does not import.
    """
    factory = load_plugin(LOSSES, name)
    if not callable(factory):
        raise PluginError(
            f"loss {name!r} from {available_losses()[name]} must be a callable that returns a "
            f"module, got {type(factory).__name__}"
        )
    return typing.cast("Callable[..., nn.Module]", factory)


def loss_options(name: str) -> dict[str, inspect.Parameter]:
    """Return the options that a loss takes in its spec, by name, with defaults and annotations."""
    return {
        key: parameter
        for key, parameter in _parameters(load_factory(name)).items()
        if key not in COMMON_OPTIONS
    }


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(factory, eval_str=False)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: p for key, p in signature.parameters.items() if p.kind in kinds}


def _annotation(factory: Callable[..., Any], key: str) -> Any:
    target = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return typing.get_type_hints(target).get(key, str)
    except NameError:  # an annotation that exists for type checkers only
        return str


def _convert(spec: LossSpec, key: str, text: str, annotation: Any, *, kind: str = "loss") -> Value:
    origin = typing.get_origin(annotation)
    types = typing.get_args(annotation) if origin in (typing.Union, UnionType) else (annotation,)
    if NoneType in types and text.lower() == "none":
        return None
    if bool in types and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        if number in types:
            try:
                return number(text)
            except ValueError:
                continue
    if str in types or not any(t in types for t in (bool, int, float)):
        return text
    wanted = " or ".join("a number" if t in (int, float) else t.__name__.lower() for t in types)
    raise SpecError(
        f"option {key!r} of {kind} {spec.name!r} must be {wanted.replace('nonetype', 'none')}, "
        f"got {text!r}"
    )


def create_loss(
    spec: str | LossSpec,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> nn.Module:
    """Return the criterion that a spec names, called `loss(logits, target)`.

    Args:
        spec: `"rlo"`, `"rlo:k=5,m=5"`, any registered name.
        weight: Class weights, (C).
        ignore_index: Index targets with this value do not count.
        label_smoothing: In [0, 1].
        reduction: "mean", "sum" or "none".

    Raises:
        SpecError: malformed spec, unknown name or option, a value that the loss refuses.
        PluginError: the plugin does not import, or its name is claimed twice.
    """
    spec = parse_spec(spec)
    if spec.terms:
        return _anchored(spec, weight, ignore_index, label_smoothing, reduction)
    if spec.gates:
        return _gated(spec, weight, ignore_index, label_smoothing, reduction)
    factory = load_factory(spec.name)
    parameters = _parameters(factory)
    options: dict[str, Any] = {}
    allowed = [key for key in parameters if key not in COMMON_OPTIONS]
    for key, text in spec.options.items():
        if key not in allowed:
            takes = ", ".join(allowed) if allowed else "none"
            raise SpecError(f"loss {spec.name!r} takes no option {key!r}; it takes {takes}")
        options[key] = _convert(spec, key, text, _annotation(factory, key))
    common = {
        "weight": (weight, None),
        "ignore_index": (ignore_index, -100),
        "label_smoothing": (label_smoothing, 0.0),
        "reduction": (reduction, "mean"),
    }
    for key, (value, default) in common.items():
        if key in parameters:
            options[key] = value
        elif value is not default and value != default:
            raise SpecError(
                f"loss {spec.name!r} cannot honour {key}={value!r}; its factory has no such option"
            )
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise SpecError(f"loss '{spec}': {error}") from error


def _gated(
    spec: LossSpec,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> nn.Module:
    from rlo_core.gates import GatedLoss, create_gate

    if weight is not None or label_smoothing:
        given = "class weights" if weight is not None else f"label_smoothing={label_smoothing}"
        raise SpecError(f"loss '{spec}' cannot honour {given}: it has gates")
    gates = [create_gate(gate.name, dict(gate.options)) for gate in spec.gates]
    criterion = create_loss(LossSpec(spec.name, spec.options), ignore_index=ignore_index)
    return GatedLoss(
        criterion,
        gates,
        ignore_index=ignore_index,
        reduction=reduction,  # type: ignore[arg-type]
    )


def _anchored(
    spec: LossSpec,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> nn.Module:
    from rlo_core.terms import AnchoredLoss, create_term

    terms = [create_term(term.name, dict(term.options)) for term in spec.terms]
    criterion = create_loss(
        LossSpec(spec.name, spec.options, spec.gates),
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return AnchoredLoss(
        criterion,
        terms,
        ignore_index=ignore_index,
        reduction=reduction,  # type: ignore[arg-type]
    )


def link_of(criterion: nn.Module) -> Link | None:
    """Return the link of a criterion, or None where its loss is not a function of cross entropy.

    With a link a criterion can be used fused with a linear layer, per token and on binary targets.
    """
    from rlo_core.links import Link

    link = getattr(criterion, "link", None)
    return link if isinstance(link, Link) else None


def create_binary_loss(
    spec: str | LossSpec,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> BinaryLinkLoss:
    """Return the binary (multi-label) form of a loss: its link on each logit's own two classes.

    Raises:
        SpecError: as `create_loss`, and for a loss that has no link.
    """
    from rlo_core.modules import BinaryLinkLoss, LinkLoss

    criterion = create_loss(spec)
    link = link_of(criterion)
    if link is None:
        raise SpecError(f"loss '{spec}' has no link, so it has no binary form")
    return BinaryLinkLoss(
        criterion if isinstance(criterion, LinkLoss) else link,
        weight=weight,
        pos_weight=pos_weight,
        reduction=reduction,  # type: ignore[arg-type]
    )
