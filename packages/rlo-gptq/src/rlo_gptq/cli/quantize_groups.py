"""The options of `rlo-gptq quantize`, by what they are about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import click

from rlo_gptq.budget import PROBE_TOKENS, Budget
from rlo_gptq.cli.groups import option
from rlo_gptq.cli.sizes import size_in_bytes
from rlo_gptq.options import PLAIN, Options
from rlo_gptq.settings import (
    ALL_BITS,
    BITS,
    METHODS,
    Compat,
    GridKind,
    Incoherence,
    LayerSettings,
    Method,
    ScaleDtype,
    Sides,
    TuneSettings,
)

_STORED = click.Choice((*BITS, 16, 32))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Bits and grids."""

    wbits: int = option(
        type=click.Choice(ALL_BITS),
        default=LayerSettings.bits,
        show_default=True,
        help="Bits of a weight; a trellis has 1 to 4.",
    )
    bits: tuple[str, ...] = option(
        multiple=True,
        default=(),
        metavar="NAME=BITS,...",
        help="Bits of some layers, by parts of their names, e.g. mlp.down_proj=4,layers.0=6; of "
        "two that match the later wins. Repeatable.",
    )
    embed_bits: int | None = option(
        type=_STORED,
        help="Bits of the token embedding; by default 8 where --wbits is at most 4. 16, 32: left "
        "so.",
    )
    head_bits: int | None = option(
        type=_STORED,
        help="Bits of the output head, likewise; one that is tied has the embedding's.",
    )
    groupsize: int = option(
        type=click.IntRange(min=-1),
        default=LayerSettings.group_size,
        show_default=True,
        help="Columns that share a scale; -1 a row, 0 the whole matrix.",
    )
    sym: bool = option(
        "--sym/--asym", default=True, show_default=True, help="Symmetric grid, or a zero."
    )
    integer_zero: bool = option(
        is_flag=True, default=False, help="Zeros are codes, as other formats need."
    )
    grid: GridKind = option(
        type=click.Choice((*get_args(GridKind), "trellis:L=10")),
        default=LayerSettings.grid,
        show_default=True,
        help="What a code stands for: a level, or a path through 2^L values (L = 10 unless said).",
    )
    scale_dtype: ScaleDtype = option(
        type=click.Choice(["float32", "float16", "bfloat16"]),
        default=LayerSettings.scale_dtype,
        show_default=True,
    )
    refit: bool = option(
        "--refit/--no-refit", default=True, help="Least squares of scales after rounding."
    )
    qfn: Literal["a", "b"] | None = option(
        type=click.Choice(["a", "b"]), help="a: --asym --integer-zero; b: --sym."
    )


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size."""

    bytes: int | None = option(
        type=size_in_bytes,
        metavar="SIZE",
        help="Choose the bits of every layer, of embedding and head so that the weight files have "
        "at most this size, e.g. 60MB.",
    )
    average_bits: float | None = option(
        type=click.FloatRange(BITS[0], BITS[-1]),
        help="The same, within the size that a uniform model of so many bits would have: 2.5.",
    )
    probe_tokens: int | None = option(
        type=click.IntRange(min=2),
        help=f"Over which each layer's effect on the output is measured: {PROBE_TOKENS}.",
    )

    def __post_init__(self) -> None:
        if self.bytes is not None and self.average_bits is not None:
            raise ValueError("--bytes and --average-bits exclude each other")
        if self.budget is None and self.probe_tokens is not None:
            raise ValueError("--probe-tokens needs --bytes or --average-bits")

    @property
    def budget(self) -> Budget | None:
        """How large the files may be; None where that is not asked for."""
        if self.bytes is None and self.average_bits is None:
            return None
        return Budget(self.bytes, self.average_bits)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Rounding."""

    quant: Method = option(
        type=click.Choice(METHODS),
        default=LayerSettings.method,
        show_default=True,
        help="How a layer is rounded.",
    )
    npasses: int | None = option(
        type=click.IntRange(min=0),
        help="Greedy passes; by default up to 10 for ldlqRG, allbal and ldlbal_admm, 0 for the "
        "others.",
    )
    percdamp: float = option(
        type=click.FloatRange(min=0), default=LayerSettings.percdamp, show_default=True
    )
    act_order: bool = option(
        is_flag=True, default=False, help="gptq: columns by falling diagonal of H."
    )
    unbiased: bool = option(
        is_flag=True, default=False, help="Stochastic rounding; no greedy passes."
    )
    block_size: int = option(
        type=click.IntRange(min=1), default=LayerSettings.block_size, show_default=True
    )
    true_sequential: bool = option(
        "--true-sequential/--no-true-sequential",
        default=True,
        show_default=True,
        help="Inside a block, later layers see the earlier ones quantized.",
    )
    skip: tuple[str, ...] = option(
        multiple=True, default=(), help="Layers to leave, e.g. '*.down_proj'; repeatable."
    )
    pre_gptqh: bool = option(
        "--pre-gptqH", is_flag=True, default=False, help="Always on here; see --percdamp."
    )
    lazy_batch: bool = option(
        is_flag=True, default=False, help="Everything is blocked here; for --compat only."
    )
    compat: Compat | None = option(
        type=click.Choice(["quip"]), help="The authors' codes, faults included."
    )


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Incoherence."""

    incoh_processing: bool = option(
        is_flag=True,
        default=False,
        help="Incoherence processing: rescaling, a random rotation, one symmetric grid. "
        "Recommended; on at 2 bits unless another option excludes it.",
    )
    incoherence: Incoherence | None = option(
        type=click.Choice(["none", "hadamard", "kronecker"]),
        help="Which rotation; --incoh-processing takes hadamard.",
    )
    incoh_sides: Sides = option(
        type=click.Choice(["in", "both"]),
        default=LayerSettings.incoherence_sides,
        show_default=True,
        help="Rotate inputs only, which is as good at half the cost, or outputs too.",
    )
    rotate: Literal["fold"] | None = option(
        type=click.Choice(["fold"]),
        help="Fold random rotations into the weights: incoherence at no run-time cost.",
    )
    pre_rescale: bool = option(is_flag=True, default=False, help="Rescale columns before rounding.")
    pre_proj: bool = option(is_flag=True, default=False, help="Rotate; --incoherence says how.")
    pre_proj_extra: int = option(
        type=click.Choice([0, 1, 2]),
        default=LayerSettings.proj_extra,
        help="The authors' variants of the Kronecker rotation.",
    )

    @property
    def at_run_time(self) -> bool:
        """Whether inputs are rotated or rescaled when the model runs."""
        rotated = self.incoh_processing or self.pre_proj or self.pre_rescale
        return rotated or self.incoherence not in (None, "none")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Tuning."""

    stages: tuple[Literal["block", "e2e"], ...] = option(
        "--tune",
        type=click.Choice(["block", "e2e"]),
        is_flag=False,
        flag_value="block",
        multiple=True,
        default=(),
        help="block (--tune alone): finetune each block's scales and norms against its own dense "
        "output; e2e: afterwards the whole model against the dense one's. Repeatable.",
    )
    epochs: int | None = option(
        "--tune-epochs",
        type=click.IntRange(min=1),
        help=f"block: passes over the sequences: {TuneSettings.epochs}.",
    )
    rate: float | None = option(
        "--tune-lr",
        type=click.FloatRange(0, 1, min_open=True),
        help=f"block: relative to a scale: {TuneSettings.learning_rate:g}.",
    )

    def __post_init__(self) -> None:
        for flag, value in (("--tune-epochs", self.epochs), ("--tune-lr", self.rate)):
            if value is not None and "block" not in self.stages:
                raise ValueError(f"{flag} needs --tune block")

    def of_blocks(self) -> TuneSettings | None:
        """Return how blocks are tuned; None if they are not."""
        if "block" not in self.stages:
            return None
        return TuneSettings(
            self.epochs or TuneSettings.epochs, self.rate or TuneSettings.learning_rate
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration."""

    nsamples: int = option(type=click.IntRange(min=1), default=Options.nsamples, show_default=True)
    seqlen: int | None = option(
        type=click.IntRange(min=2),
        help="Tokens of a calibration sequence; by default the model's length, at most 2048.",
    )
    seed: int = option(type=int, default=Options.seed, show_default=True)
    split: Literal["train", "validation", "test"] | None = option(
        type=click.Choice(["train", "validation", "test"]), help="Of the data."
    )
    hessian: str = option(
        default=PLAIN,
        show_default=True,
        metavar="plain|SPEC",
        help="Weight calibration tokens by the slope of a loss, e.g. rlo:k=5.",
    )
    hessian_energy: bool = option(
        is_flag=True,
        default=False,
        help="Weight them by that loss's squared gradient instead.",
    )

    def __post_init__(self) -> None:
        if self.hessian == PLAIN and self.hessian_energy:
            raise ValueError("--hessian-energy needs --hessian SPEC")


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Other formats."""

    names: tuple[Literal["gptq", "compressed-tensors", "gguf"], ...] = option(
        "--format",
        type=click.Choice(["gptq", "compressed-tensors", "gguf"]),
        multiple=True,
        default=(),
        help="Write it in this format too, beside DIR; repeatable. Takes integer zeros. gguf "
        "instead makes DIR/MODEL-TYPE.gguf, rounded onto that type's own grid.",
    )
    gguf_type: str | None = option(
        "--type",
        metavar="TYPE",
        help="Of the GGUF file: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL Q2_K Q2_K_S Q3_K_S|M|L Q4_K_S|M "
        "Q5_K_S|M Q6_K; Q4_K_M if it is left out.",
    )
    peers: tuple[Literal["transformers", "gptqmodel"], ...] = option(
        "--verify-with",
        type=click.Choice(["transformers", "gptqmodel"]),
        multiple=True,
        default=(),
        help="Reload what was written for others there and compare the logits; repeatable.",
    )


@dataclass(frozen=True, kw_only=True)
class Running:
    """Where and how."""

    device: str = option(
        default="auto", show_default=True, help="auto is the GPU if there is one; cpu, ..."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="In which blocks are run.",
    )
    offload: bool = option(is_flag=True, default=False, help="Keep activations in a file.")
    trust_remote_code: bool = option(
        is_flag=True, default=False, help="Run code from the model's folder."
    )
