"""What decides the codes of one layer, and nothing else: a frozen record that imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Method = Literal["nearest", "gptq", "ldlq", "ldlqRG", "allbal", "ldlbal_admm"]
GridKind = Literal["scalar", "trellis", "trellis:L=12", "trellis:L=14", "trellis:L=16"]
Incoherence = Literal["none", "hadamard", "kronecker"]
Sides = Literal["in", "both"]
Compat = Literal["quip"]
ScaleDtype = Literal["float32", "float16", "bfloat16"]

METHODS: tuple[str, ...] = get_args(Method)
BITS = (2, 3, 4, 5, 6, 8)
TRELLIS_BITS = (1, 2, 3, 4)
ALL_BITS = tuple(sorted({*BITS, *TRELLIS_BITS}))

# Greedy passes after each method when the user names none; fewer run where one changes no code,
# which after ldlqRG is usually the fifth.
DEFAULT_PASSES = {"ldlqRG": 10, "allbal": 10, "ldlbal_admm": 10}


@dataclass(frozen=True)
class LayerSettings:
    r"""Everything that decides how one (m, d) weight matrix is rounded.

    Args:
        bits: bits of one code, 2, 3, 4, 5, 6 or 8.
        method: `nearest`, `gptq`, `ldlq`, `ldlqRG`, `allbal` or `ldlbal_admm`.
        grid: `scalar`, or a trellis (1 to 4 bits, trellis-coded sequences down the rows): `trellis`
            with states of 10 bits, `trellis:L=12`, `trellis:L=14`, `trellis:L=16` with wider ones,
            which are better and take up to four times as long for every two bits.
        group_size: -1 one scale per row, 0 one for the matrix, n > 0 one per n columns of a row
            (the last group may be short).
        sym: symmetric grid; False searches the zero point too.
        integer_zero: the zero point is a code, as the GPTQ and compressed-tensors formats need; a
            half-integer zero is better by about 28 % of the loss at 2 bits.
        incoherence: `none`, `hadamard` (randomised, any width) or `kronecker` (QuIP's two factors).
        incoherence_sides: `in` rotates the inputs only, which is as good and costs half as much.
        rescale: QuIP's diagonal rescaling of columns before the rotation.
        percdamp: damping as a fraction of the mean diagonal of the Hessian; 0 for none.
        npasses: greedy passes after the method; None takes what pays for the method.
        unbiased: stochastic rounding, so that E[What] = W inside the grid; excludes greedy passes.
        block_size: columns in a block of the triangular solve; changes speed, and rounding of sums.
        act_order: `gptq` visits columns by falling diag(H) instead of left to right.
        scale_dtype: type in which scales are stored; rounding happens on the stored values.
        refit: refit scales by least squares in the Hessian's norm after rounding.
        proj_extra: variant of `kronecker`, the authors' numbers: 0 a block for every slice and
            permutations, 1 one block per factor, 2 no permutations.
        lazy_batch: accepted because the authors' script has it; everything here is blocked. With
            `compat` it reproduces upstream's swapped arguments, and no greedy pass is done.
        compat: `quip` reproduces the authors' codes, faults included, for comparison.

    Raises:
        ValueError: an option is out of its range, or two exclude each other.
    """

    bits: int = 2
    method: Method = "ldlqRG"
    grid: GridKind = "scalar"
    group_size: int = -1
    sym: bool = True
    integer_zero: bool = False
    incoherence: Incoherence = "none"
    incoherence_sides: Sides = "in"
    rescale: bool = False
    percdamp: float = 0.01
    npasses: int | None = None
    unbiased: bool = False
    block_size: int = 128
    act_order: bool = False
    scale_dtype: ScaleDtype = "float16"
    refit: bool = True
    proj_extra: int = 0
    lazy_batch: bool = False
    compat: Compat | None = None

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("grid", self.grid, get_args(GridKind))
        one_of("bits", self.bits, BITS if self.grid == "scalar" else TRELLIS_BITS)
        one_of("incoherence", self.incoherence, get_args(Incoherence))
        one_of("incoherence_sides", self.incoherence_sides, get_args(Sides))
        one_of("scale_dtype", self.scale_dtype, get_args(ScaleDtype))
        one_of("proj_extra", self.proj_extra, (0, 1, 2))
        one_of("compat", self.compat, (None, *get_args(Compat)))
        if self.group_size < -1:
            raise ValueError(f"group_size must be -1, 0 or positive, got {self.group_size}")
        if not 0 <= self.percdamp < float("inf"):
            raise ValueError(f"percdamp must be finite and at least 0, got {self.percdamp}")
        if self.npasses is not None and self.npasses < 0:
            raise ValueError(f"npasses must be at least 0, got {self.npasses}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.unbiased and self.npasses:
            raise ValueError(f"npasses must be 0 with unbiased rounding, got {self.npasses}")
        if self.grid != "scalar":
            self._check_trellis()
        if self.compat is not None:
            self._check_compat()

    def _check_trellis(self) -> None:
        for name in ("unbiased", "integer_zero"):
            if getattr(self, name):
                raise ValueError(f"{name} must be False with grid {self.grid!r}, got True")
        if not self.sym:
            raise ValueError(f"sym must be True with grid {self.grid!r}, got False")
        if self.compat is not None:
            raise ValueError(f"compat must be None with grid {self.grid!r}, got {self.compat!r}")
        if self.method == "ldlbal_admm":
            raise ValueError(
                f"method must not be 'ldlbal_admm' with grid {self.grid!r}; use 'ldlqRG'"
            )

    def _check_compat(self) -> None:
        if self.group_size != -1:
            raise ValueError(f"group_size must be -1 with compat 'quip', got {self.group_size}")
        if not self.npasses:  # upstream's default, with which these two fail
            if self.method == "allbal":
                raise ValueError("npasses must be positive for 'allbal' with compat 'quip', got 0")
            if self.lazy_batch and self.method in ("ldlq", "ldlqRG"):
                raise ValueError(
                    "npasses must be positive with lazy_batch and compat 'quip', got 0"
                )
        if self.sym == self.integer_zero:
            raise ValueError(
                "compat 'quip' has two grids, sym without integer_zero (qfn b) and integer_zero "
                f"without sym (qfn a), got sym={self.sym} and integer_zero={self.integer_zero}"
            )

    @property
    def passes(self) -> int:
        """The number of greedy passes that will be done."""
        if self.npasses is not None:
            return self.npasses
        # A pass of the trellis costs as much as the first rounding; the second gains 0.4 %.
        if self.grid != "scalar" and self.method in DEFAULT_PASSES:
            return 1
        return 0 if self.unbiased else DEFAULT_PASSES.get(self.method, 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)

    def with_bits(self, bits: int) -> LayerSettings:
        """Return the settings of a layer with other bits; the grid is scalar where a trellis has
        not so many.

        Raises:
            ValueError: there is no grid of so many bits.
        """
        if bits == self.bits:
            return self
        grid: GridKind = self.grid if bits in TRELLIS_BITS else "scalar"
        return dataclasses.replace(self, bits=bits, grid=grid)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerSettings:
        """Build settings from `to_dict`'s mapping.

        Raises:
            ValueError: a name is unknown, or a value is out of range or of the wrong type.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ";"
                raise ValueError(
                    f"unknown setting {name!r}{hint} available: {', '.join(sorted(fields))}"
                )
            _check_type(name, value, str(fields[name].type))
        return cls(**values)


@dataclass(frozen=True)
class TuneSettings:
    """How a block's scales and norms are finetuned after rounding, see `tune.py`.

    Args:
        epochs: Passes over the calibration sequences.
        learning_rate: Of Adam, falling to 0; relative to a scale, or to the size of a norm's gain.

    Raises:
        ValueError: an option is out of its range.
    """

    epochs: int = 5
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"tune epochs must be at least 1, got {self.epochs}")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"tune learning rate must be above 0 and at most 1, got {self.learning_rate}"
            )


@dataclass(frozen=True)
class EndToEndSettings:
    """How a packed model is finetuned against the dense model's output, see `tuning/`.

    Args:
        steps: Steps of Adam.
        learning_rate: Relative to a scale, or to the size of another tensor; rises over the first
            twentieth of the steps and falls to 0.
        batch: Sequences of a step.
        nsamples: Sequences of the text that are used; one in eight of them is held out.
        seqlen: Tokens in each; None is the model's length, at most 2048.
        top_k: Tokens of the dense model's distribution that are kept; the rest is one event.
        loss: A loss spec by whose slope at the dense model's cross entropy tokens are weighted;
            "ce" weights all alike.
        embeddings: Train embeddings and the output layer too: the scales of packed ones, others
            whole.
        evaluations: How often the sequences held out are looked at, and the state is saved.
        seed: Of the sequences and of their order.

    Raises:
        ValueError: an option is out of its range.
    """

    steps: int = 200
    learning_rate: float = 1e-2
    batch: int = 2
    nsamples: int = 256
    seqlen: int | None = None
    top_k: int = 64
    loss: str = "ce"
    embeddings: bool = True
    evaluations: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "top_k", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"tuning {name} must be at least 1, got {getattr(self, name)}")
        if self.nsamples < 2:
            raise ValueError(
                f"tuning needs at least 2 sequences, one to be held out, got {self.nsamples}"
            )
        if self.seqlen is not None and self.seqlen < 2:
            raise ValueError(f"tuning seqlen must be at least 2, got {self.seqlen}")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"tuning learning rate must be above 0 and at most 1, got {self.learning_rate}"
            )


def trellis_state_bits(grid: str) -> int | None:
    """Return the bits of a state of a grid's trellis; None for a scalar grid."""
    if grid == "scalar":
        return None
    return int(grid.partition("=")[2] or 10)


def one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`, of the same type."""
    # `True in (1, 2)` holds, and 2.0 == 2: neither is a number of bits.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def _check_type(name: str, value: object, annotation: str) -> None:
    allowed: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "int": (int,),
        "int | None": (int, type(None)),
        "float": (int, float),
    }
    types = allowed.get(annotation)
    if types is None:  # a closed choice, checked by the class itself
        return
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{name} must be {annotation.replace(' | ', ' or ')}, got {value!r}")
