"""`rlo-gptq plan`: what a quantization takes, from a config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from rlo_gptq.cli import options as shared
from rlo_gptq.cli.groups import GroupedCommand, filled, option
from rlo_gptq.cli.options import print_plan
from rlo_gptq.settings import BITS, METHODS, GridKind, Incoherence, LayerSettings, Method

if TYPE_CHECKING:
    from rlo_gptq.pipeline.capacity import Ceilings

_DEVICES = ("h100", "h200", "a100", "l40s", "rtx4090", "cpu")
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Rounding."""

    wbits: int = option(type=click.Choice(BITS), default=LayerSettings.bits, show_default=True)
    groupsize: int = option(
        type=click.IntRange(min=-1),
        default=LayerSettings.group_size,
        show_default=True,
        help="Columns that share a scale; -1 a row.",
    )
    grid: GridKind = option(
        type=click.Choice(["scalar", "trellis"]), default=LayerSettings.grid, show_default=True
    )
    quant: Method = option(
        type=click.Choice(METHODS), default=LayerSettings.method, show_default=True
    )
    npasses: int | None = option(type=click.IntRange(min=0), help="Greedy passes.")
    incoherence: Incoherence = option(
        type=click.Choice(["none", "hadamard", "kronecker"]), default="hadamard", show_default=True
    )
    outside_bits: int = option(
        type=click.Choice((*BITS, 16)),
        default=8,
        show_default=True,
        help="Of embedding and head.",
    )

    @property
    def layer(self) -> LayerSettings:
        """The settings of every layer."""
        return LayerSettings(
            bits=self.wbits,
            group_size=self.groupsize,
            grid=self.grid,
            method=self.quant,
            npasses=self.npasses,
            incoherence=self.incoherence,
            rescale=self.incoherence != "none",
        )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine."""

    on: str = option(
        type=click.Choice(_DEVICES),
        default="h100",
        show_default=True,
        help="Whose ceilings are taken; cpu is one core.",
    )
    processes: int = option(
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Of torchrun, one device each.",
    )
    tflops: float | None = option(
        type=click.FloatRange(min=0, min_open=True),
        help="Of float32 products, instead of the device's; half precision is scaled with it.",
    )
    bandwidth: float | None = option(
        type=click.FloatRange(min=0, min_open=True),
        help="Of its memory in GB/s, instead of the device's.",
    )
    memory: float | None = option(
        type=click.FloatRange(min=0, min_open=True), help="In GB, instead of the device's."
    )

    def ceilings(self) -> Ceilings:
        """What the device reaches, with what was said instead."""
        from rlo_gptq.pipeline.capacity import DEVICES, Ceilings

        own = DEVICES[self.on]
        single = own.single if self.tflops is None else 1e12 * self.tflops
        return Ceilings(
            own.half * single / own.single,
            single,
            own.bandwidth if self.bandwidth is None else 1e9 * self.bandwidth,
            own.memory if self.memory is None else 1e9 * self.memory,
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration."""

    nsamples: int = option(type=click.IntRange(min=1), default=128, show_default=True)
    seqlen: int | None = option(
        type=click.IntRange(min=2), help="Tokens of a sequence; the model's, at most 2048."
    )
    dtype: str = option(
        type=click.Choice(_DTYPES),
        default="bfloat16",
        show_default=True,
        help="In which blocks are run.",
    )


@click.command(cls=GroupedCommand)
@click.argument("model")
@filled("rounding", Rounding)
@filled("machine", Machine)
@filled("calibration", Calibration)
@shared.as_json
def plan(
    model: str, as_json: bool, *, rounding: Rounding, machine: Machine, calibration: Calibration
) -> None:
    """Say what quantizing MODEL (folder, config.json, hub name) takes; reads no weights.

    Times are operation counts over two ceilings of the device, flops and bandwidth: a lower bound.
    """
    from rlo_gptq.pipeline.capacity import plan_capacity

    try:
        settings = rounding.layer
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    document = plan_capacity(
        model,
        settings,
        device=machine.on,
        ceilings=machine.ceilings(),
        processes=machine.processes,
        nsamples=calibration.nsamples,
        seqlen=calibration.seqlen,
        dtype=calibration.dtype,
        outside_bits=rounding.outside_bits,
    )
    print_plan(document, as_json=as_json)
