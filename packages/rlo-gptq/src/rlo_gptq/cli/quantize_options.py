"""From the groups of options of `quantize` to what is done, and what excludes what."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import click

from rlo_gptq.bit_rules import BitRuleError, Rules, parse_rules
from rlo_gptq.cli.groups import was_given
from rlo_gptq.cli.quantize_groups import (
    Calibration,
    Formats,
    Grid,
    Rotation,
    Rounding,
    Running,
    Tuning,
)
from rlo_gptq.cli.tune import EndToEnd
from rlo_gptq.options import Options
from rlo_gptq.settings import GridKind, Incoherence, LayerSettings


def chosen_options(
    model: str,
    dataset: str,
    *,
    grid: Grid,
    rounding: Rounding,
    rotation: Rotation,
    calibration: Calibration,
    tuning: Tuning,
    end_to_end: EndToEnd,
    formats: Formats,
    running: Running,
) -> Options:
    """Return what the groups say together.

    Raises:
        click.UsageError: options that exclude each other, or one that needs another.
    """
    compat = rounding.compat is not None
    if grid.qfn == "a":
        grid = replace(grid, sym=False, integer_zero=True)
    if grid.qfn == "b" or (compat and rotation.incoh_processing):
        grid = replace(grid, sym=True, integer_zero=False)
    gguf = _gguf_type(formats, rounding, tuned=bool(tuning.stages))
    others = tuple(name for name in formats.names if name != "gguf")
    if gguf is not None:
        _check_gguf(formats, rotation)
    if others:
        _check_other_formats(grid, rounding, rotation)
        grid = replace(grid, integer_zero=True)
    if formats.peers and not others:
        raise click.UsageError("--verify-with needs --format")
    for option, there in (("--compat", compat), ("--unbiased", rounding.unbiased)):
        if tuning.stages and there:
            raise click.UsageError(f"--tune moves the scales, which {option} fixes; leave one out")
    if "e2e" not in tuning.stages:
        for name in end_to_end.given():
            flag = {"learning_rate": "rate"}.get(name, name).replace("_", "-")
            raise click.UsageError(f"--tune-{flag} needs --tune e2e")
    return Options(
        model=model,
        dataset=dataset,
        layer=layer_settings(grid, rounding, rotation),
        nsamples=calibration.nsamples,
        seqlen=calibration.seqlen,
        seed=calibration.seed,
        true_sequential=rounding.true_sequential,
        skip=rounding.skip,
        dtype=running.dtype,
        offload=running.offload,
        trust_remote_code=running.trust_remote_code,
        split=calibration.split,
        hessian=calibration.hessian,
        hessian_energy=calibration.hessian_energy,
        rotate=rotation.rotate,
        tune=tuning.of_blocks(),
        end_to_end=end_to_end.settings(seqlen=calibration.seqlen, seed=calibration.seed)
        if "e2e" in tuning.stages
        else None,
        bits=_rules(grid.bits),
        embed_bits=grid.embed_bits,
        head_bits=grid.head_bits,
        formats=others,
        gguf=gguf,
    )


RECOMMENDED = (
    "2 bits: incoherence processing is on, as recommended (--incoherence none leaves it out, "
    "--compat quip is the authors' plain script); --tune e2e gains more, at the cost of time"
)


def recommended(grid: Grid, rounding: Rounding, rotation: Rotation, formats: Formats) -> Rotation:
    """Return the rotation that is recommended where the user chose none at 2 bits.

    Without one, the outliers of a trained model leave two bits little to say. Left as it is where
    another option excludes rotations or fixes the grid.
    """
    chosen = rotation != Rotation() or was_given("rotation", "incoherence")
    fixed = rounding.compat is not None or grid.qfn is not None or not grid.sym
    if grid.wbits != 2 or chosen or fixed or grid.integer_zero or formats.names:
        return rotation
    return replace(rotation, incoh_processing=True)


def _rules(given: tuple[str, ...]) -> Rules:
    if not given:
        return ()
    try:
        return parse_rules(given)
    except BitRuleError as error:
        raise click.UsageError(str(error)) from error


def layer_settings(grid: Grid, rounding: Rounding, rotation: Rotation) -> LayerSettings:
    """Return how each layer is rounded.

    Raises:
        click.UsageError: a value is out of its range, or two exclude each other.
    """
    compat = rounding.compat is not None
    rotated = rotation.incoh_processing or rotation.pre_proj
    implied: Incoherence = ("kronecker" if compat else "hadamard") if rotated else "none"
    try:
        return LayerSettings(
            bits=grid.wbits,
            method=rounding.quant,
            grid=cast("GridKind", grid.grid.removesuffix(":L=10")),  # the name it has had
            group_size=grid.groupsize,
            sym=grid.sym,
            integer_zero=grid.integer_zero,
            incoherence=rotation.incoherence or implied,
            incoherence_sides="both" if compat and rotated else rotation.incoh_sides,
            rescale=rotation.pre_rescale or rotation.incoh_processing,
            percdamp=rounding.percdamp,
            npasses=rounding.npasses,
            unbiased=rounding.unbiased,
            block_size=rounding.block_size,
            act_order=rounding.act_order,
            scale_dtype=grid.scale_dtype,
            refit=grid.refit,
            proj_extra=rotation.pre_proj_extra,
            lazy_batch=rounding.lazy_batch,
            compat=rounding.compat,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _check_other_formats(grid: Grid, rounding: Rounding, rotation: Rotation) -> None:
    _check_unrotated(rotation, "--format")
    if grid.grid != "scalar":
        raise click.UsageError(f"--format takes --grid scalar, got {grid.grid}")
    if rounding.compat and grid.sym:
        raise click.UsageError("--format takes integer zeros: with --compat quip, --qfn a")


def _check_unrotated(rotation: Rotation, option: str) -> None:
    if rotation.at_run_time:
        raise click.UsageError(
            f"{option} takes no rotation at run time; use --rotate fold instead of "
            "--incoh-processing, --incoherence, --pre-proj and --pre-rescale"
        )


# What the type of a GGUF file decides by itself.
_OF_THE_TYPE = {
    "wbits": "--wbits",
    "bits": "--bits",
    "groupsize": "--groupsize",
    "sym": "--sym/--asym",
    "integer_zero": "--integer-zero",
    "grid": "--grid",
    "qfn": "--qfn",
    "scale_dtype": "--scale-dtype",
}


def _gguf_type(formats: Formats, rounding: Rounding, *, tuned: bool) -> str | None:
    """Return the type of the GGUF file to make, or None.

    Raises:
        click.UsageError: options that exclude each other.
    """
    if "gguf" not in formats.names:
        if formats.gguf_type is not None:
            raise click.UsageError("--type needs --format gguf")
        return None
    if len(set(formats.names)) > 1:
        raise click.UsageError(
            "--format gguf rounds onto grids of its own; make the other formats in another run"
        )
    excluded = {
        "--tune": tuned,
        "--unbiased": rounding.unbiased,
        "--compat": rounding.compat is not None,
    }
    for option, there in excluded.items():
        if there:
            raise click.UsageError(f"--format gguf takes no {option}")
    from rlo_gptq.formats.gguf.types import FLOAT_TYPES, GGUFError, file_type

    try:
        found = file_type(formats.gguf_type or "Q4_K_M")
    except GGUFError as error:
        raise click.UsageError(str(error)) from error
    if found in FLOAT_TYPES:
        raise click.UsageError(f"--type must be a quantized type, got {found}")
    return found


def _check_gguf(formats: Formats, rotation: Rotation) -> None:
    """Refuse options that a GGUF file cannot follow.

    Raises:
        click.UsageError: names the option.
    """
    _check_unrotated(rotation, "--format gguf")
    if formats.peers:
        raise click.UsageError(
            "--verify-with takes no GGUF file; scripts/verify_gguf.py runs it in llama.cpp"
        )
    for name, option in _OF_THE_TYPE.items():
        if was_given("grid", name):
            raise click.UsageError(f"--type decides the grid of a GGUF file; leave out {option}")
