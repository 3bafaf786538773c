"""`rlo-gptq quantize`: the authors' flags, and those they lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from rlo_gptq.cli import options as shared
from rlo_gptq.cli.formats import check_peers, described, export_and_verify
from rlo_gptq.cli.options import MB, both_spellings, print_plan
from rlo_gptq.cli.tune import described as tuning_described
from rlo_gptq.cli.tune import tuning_options, tuning_settings
from rlo_gptq.pipeline.run import run_quantization as run_quantization
from rlo_gptq.settings import BITS, METHODS, LayerSettings, TuneSettings

if TYPE_CHECKING:
    from rlo_gptq.options import Options


@click.command()
@click.argument("model")
@click.argument("dataset")
@click.option(
    "--wbits", type=click.Choice([str(bits) for bits in BITS]), default="2", show_default=True
)
@both_spellings(
    "embed-bits",
    type=click.Choice([str(bits) for bits in (*BITS, 16, 32)]),
    help="Bits of the token embedding; by default 8 where --wbits is at most 4. 16, 32: left so.",
)
@both_spellings(
    "head-bits",
    type=click.Choice([str(bits) for bits in (*BITS, 16, 32)]),
    help="Bits of the output head, likewise; one that is tied has the embedding's.",
)
@click.option(
    "--quant",
    type=click.Choice(METHODS),
    default="ldlqRG",
    show_default=True,
    help="How a layer is rounded.",
)
@both_spellings(
    "incoh-processing",
    is_flag=True,
    help="Incoherence processing: rescaling, a random rotation, one symmetric grid. Recommended.",
)
@click.option(
    "--incoherence",
    type=click.Choice(["none", "hadamard", "kronecker"]),
    help="Which rotation; --incoh-processing takes hadamard.",
)
@both_spellings(
    "incoh-sides",
    type=click.Choice(["in", "both"]),
    default="in",
    show_default=True,
    help="Rotate inputs only, which is as good at half the cost, or outputs too.",
)
@click.option(
    "--rotate",
    type=click.Choice(["fold"]),
    help="Fold random rotations into the weights: incoherence at no run-time cost.",
)
@click.option(
    "--groupsize",
    type=click.IntRange(min=-1),
    default=-1,
    show_default=True,
    help="Columns that share a scale; -1 a row, 0 the whole matrix.",
)
@click.option("--sym/--asym", default=True, show_default=True, help="Symmetric grid, or a zero.")
@both_spellings("integer-zero", is_flag=True, help="Zeros are codes, as other formats need.")
@click.option(
    "--grid",
    type=click.Choice(["scalar", "trellis"]),
    default="scalar",
    show_default=True,
    help="What a code stands for.",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(["gptq", "compressed-tensors", "gguf"]),
    multiple=True,
    help="Write it in this format too, beside DIR; repeatable. Takes integer zeros. gguf instead "
    "makes DIR/MODEL-TYPE.gguf, rounded onto that type's own grid.",
)
@click.option(
    "--type",
    "gguf_type",
    metavar="TYPE",
    help="Of the GGUF file: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL Q2_K Q2_K_S Q3_K_S|M|L Q4_K_S|M "
    "Q5_K_S|M Q6_K; Q4_K_M if it is left out.",
)
@shared.peers
@click.option(
    "--hessian",
    default="plain",
    show_default=True,
    metavar="plain|SPEC",
    help="Weight calibration tokens by the slope of a loss, e.g. rlo:k=5.",
)
@both_spellings(
    "hessian-energy", is_flag=True, help="Weight them by that loss's squared gradient instead."
)
@click.option(
    "--tune",
    type=click.Choice(["block", "e2e"]),
    is_flag=False,
    flag_value="block",
    multiple=True,
    help="block (--tune alone): finetune each block's scales and norms against its own dense "
    "output; e2e: afterwards the whole model against the dense one's. Repeatable.",
)
@both_spellings(
    "tune-epochs", type=click.IntRange(min=1), help="block: passes over the sequences: 5."
)
@both_spellings(
    "tune-lr", type=click.FloatRange(0, 1, min_open=True), help="block: relative to a scale: 0.01."
)
@tuning_options(short=False)
@click.option("--nsamples", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--seqlen",
    type=click.IntRange(min=2),
    help="Tokens of a calibration sequence; by default the model's length, at most 2048.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--percdamp", type=click.FloatRange(min=0), default=0.01, show_default=True)
@click.option(
    "--npasses",
    type=click.IntRange(min=0),
    help="Greedy passes; by default up to 10 for ldlqRG, allbal and ldlbal_admm, 0 for the others.",
)
@both_spellings("pre-gptqH", "pre_gptqh", is_flag=True, help="Always on here; see --percdamp.")
@both_spellings("pre-rescale", is_flag=True, help="Rescale columns before rounding.")
@both_spellings("pre-proj", is_flag=True, help="Rotate; --incoherence says how.")
@both_spellings(
    "pre-proj-extra",
    type=click.Choice(["0", "1", "2"]),
    default="0",
    help="The authors' variants of the Kronecker rotation.",
)
@click.option("--qfn", type=click.Choice(["a", "b"]), help="a: --asym --integer-zero; b: --sym.")
@click.option("--unbiased", is_flag=True, help="Stochastic rounding; no greedy passes.")
@both_spellings("lazy-batch", is_flag=True, help="Everything is blocked here; for --compat only.")
@both_spellings("act-order", is_flag=True, help="gptq: columns by falling diagonal of H.")
@both_spellings("block-size", type=click.IntRange(min=1), default=128, show_default=True)
@both_spellings(
    "scale-dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float16",
    show_default=True,
)
@click.option("--refit/--no-refit", default=True, help="Least squares of scales after rounding.")
@both_spellings(
    "true-sequential/--no-true-sequential",
    default=True,
    show_default=True,
    help="Inside a block, later layers see the earlier ones quantized.",
)
@click.option("--compat", type=click.Choice(["quip"]), help="The authors' codes, faults included.")
@shared.save
@click.option("--skip", multiple=True, help="Layers to leave, e.g. '*.down_proj'; repeatable.")
@shared.split
@shared.offload
@shared.device
@shared.dtype("In which blocks are run.")
@both_spellings("trust-remote-code", is_flag=True, help="Run code from the model's folder.")
@both_spellings("dry-run", is_flag=True, help="Print plan, memory and time; do nothing.")
@shared.as_json
def quantize(
    model: str,
    dataset: str,
    wbits: str,
    embed_bits: str | None,
    head_bits: str | None,
    quant: str,
    incoh_processing: bool,
    incoherence: str | None,
    incoh_sides: str,
    rotate: str | None,
    groupsize: int,
    sym: bool,
    integer_zero: bool,
    grid: str,
    formats: tuple[str, ...],
    gguf_type: str | None,
    peers: tuple[str, ...],
    hessian: str,
    hessian_energy: bool,
    tune: tuple[str, ...],
    tune_epochs: int | None,
    tune_lr: float | None,
    nsamples: int,
    seqlen: int | None,
    seed: int,
    percdamp: float,
    npasses: int | None,
    pre_gptqh: bool,
    pre_rescale: bool,
    pre_proj: bool,
    pre_proj_extra: str,
    qfn: str | None,
    unbiased: bool,
    lazy_batch: bool,
    act_order: bool,
    block_size: int,
    scale_dtype: str,
    refit: bool,
    true_sequential: bool,
    compat: str | None,
    folder: Path,
    skip: tuple[str, ...],
    split: str | None,
    offload: bool,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    dry_run: bool,
    as_json: bool,
    **of_tuning: Any,
) -> None:
    """Quantize MODEL (hub name, folder, GGUF), calibrated on DATASET (wikitext2, c4, ptb, path)."""
    if qfn == "a":
        sym, integer_zero = False, True
    if qfn == "b" or (compat and incoh_processing):
        sym, integer_zero = True, False
    gguf = _gguf_type(formats, gguf_type, tuned=bool(tune), unbiased=unbiased, compat=compat)
    if gguf is not None:
        formats = ()
        _check_gguf_options(
            rotated=incoh_processing
            or pre_proj
            or pre_rescale
            or (incoherence not in (None, "none")),
            peers=peers,
        )
    if formats:
        if incoh_processing or pre_proj or pre_rescale or incoherence not in (None, "none"):
            raise click.UsageError(
                "--format takes no rotation at run time; use --rotate fold instead of "
                "--incoh-processing, --incoherence, --pre-proj and --pre-rescale"
            )
        if grid != "scalar":
            raise click.UsageError(f"--format takes --grid scalar, got {grid}")
        if compat and sym:
            raise click.UsageError("--format takes integer zeros: with --compat quip, --qfn a")
        integer_zero = True
    if peers and not formats:
        raise click.UsageError("--verify-with needs --format")
    if hessian == "plain" and hessian_energy:
        raise click.UsageError("--hessian-energy needs --hessian SPEC")
    excluded = {"--compat": compat is not None, "--unbiased": unbiased}
    tuning = _tune_settings(
        "block" in tune,
        tune_epochs,
        tune_lr,
        excluded=excluded,
    )
    end_to_end = None
    if "e2e" in tune:
        _refuse_excluded(excluded)
        end_to_end = tuning_settings(of_tuning, seqlen=seqlen, seed=seed)
    else:
        for name, value in of_tuning.items():
            if value is not None:
                raise click.UsageError(f"--{name.replace('_', '-')} needs --tune e2e")
    rotated = incoh_processing or pre_proj
    kind = incoherence or (("kronecker" if compat else "hadamard") if rotated else "none")
    try:
        layer = LayerSettings(
            bits=int(wbits),
            method=cast("Any", quant),
            grid=cast("Any", grid),
            group_size=groupsize,
            sym=sym,
            integer_zero=integer_zero,
            incoherence=cast("Any", kind),
            incoherence_sides=cast("Any", "both" if compat and rotated else incoh_sides),
            rescale=pre_rescale or incoh_processing,
            percdamp=percdamp,
            npasses=npasses,
            unbiased=unbiased,
            block_size=block_size,
            act_order=act_order,
            scale_dtype=cast("Any", scale_dtype),
            refit=refit,
            proj_extra=int(pre_proj_extra),
            lazy_batch=lazy_batch,
            compat=cast("Literal['quip'] | None", compat),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    from rlo_gptq.options import Options

    options = Options(
        model=model,
        dataset=dataset,
        layer=layer,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        true_sequential=true_sequential,
        skip=skip,
        dtype=dtype,
        offload=offload,
        trust_remote_code=trust_remote_code,
        split=split,
        hessian=hessian,
        hessian_energy=hessian_energy,
        rotate=rotate,
        tune=tuning,
        end_to_end=end_to_end,
        embed_bits=None if embed_bits is None else int(embed_bits),
        head_bits=None if head_bits is None else int(head_bits),
        formats=formats,
        gguf=gguf,
    )
    if dry_run:
        _print_plan(options, device, as_json=as_json)
        return
    check_peers(peers, formats)
    document = run_quantization(options, folder, device=device)
    if document is None:  # not the first process
        return
    document["exports"] = [
        export_and_verify(folder, None, name, peers, again=True) for name in formats
    ]
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    _show(document)


# What the type of a GGUF file decides by itself.
_OF_THE_TYPE = {
    "wbits": "--wbits",
    "groupsize": "--groupsize",
    "sym": "--sym/--asym",
    "integer_zero": "--integer-zero",
    "grid": "--grid",
    "qfn": "--qfn",
    "scale_dtype": "--scale-dtype",
}


def _gguf_type(
    formats: tuple[str, ...],
    gguf_type: str | None,
    *,
    tuned: bool,
    unbiased: bool,
    compat: str | None,
) -> str | None:
    """Return the type of the GGUF file to make, or None.

    Raises:
        click.UsageError: options that exclude each other.
    """
    if "gguf" not in formats:
        if gguf_type is not None:
            raise click.UsageError("--type needs --format gguf")
        return None
    if len(set(formats)) > 1:
        raise click.UsageError(
            "--format gguf rounds onto grids of its own; make the other formats in another run"
        )
    for option, there in (("--tune", tuned), ("--unbiased", unbiased), ("--compat", bool(compat))):
        if there:
            raise click.UsageError(f"--format gguf takes no {option}")
    from rlo_gptq.formats.gguf.types import FLOAT_TYPES, GGUFError, file_type

    try:
        found = file_type(gguf_type or "Q4_K_M")
    except GGUFError as error:
        raise click.UsageError(str(error)) from error
    if found in FLOAT_TYPES:
        raise click.UsageError(f"--type must be a quantized type, got {found}")
    return found


def _check_gguf_options(*, rotated: bool, peers: tuple[str, ...]) -> None:
    """Refuse options that a GGUF file cannot follow.

    Raises:
        click.UsageError: names the option.
    """
    if rotated:
        raise click.UsageError(
            "--format gguf takes no rotation at run time; use --rotate fold instead of "
            "--incoh-processing, --incoherence, --pre-proj and --pre-rescale"
        )
    if peers:
        raise click.UsageError(
            "--verify-with takes no GGUF file; scripts/verify_gguf.py runs it in llama.cpp"
        )
    context = click.get_current_context()
    for name, option in _OF_THE_TYPE.items():
        source = context.get_parameter_source(name)
        if source not in (None, click.core.ParameterSource.DEFAULT):
            raise click.UsageError(f"--type decides the grid of a GGUF file; leave out {option}")


def _show(document: dict[str, Any]) -> None:
    """Print what was done, for people."""
    done = "complete already: " if document.get("already_done") else ""
    click.echo(
        f"{done}{document['layers']} layers at {document['bits_per_weight']} bits per weight, mean "
        f"proxy loss {document['mean_proxy']:.4g}, worst {document['worst_proxy']:.4g} "
        f"({document['worst_layer']}), {document['bytes'] / MB:.1f} MB, "
        f"{document['seconds']:.1f} s: {document['folder']}"
    )
    if "block_error_before" in document:
        click.echo(
            f"blocks tuned: mean error on held-out sequences {document['block_error_before']:.4g} "
            f"-> {document['block_error_after']:.4g}"
        )
    if "end_to_end" in document:
        click.echo(tuning_described(document["end_to_end"]))
    for exported in document["exports"]:
        click.echo(described(exported))


def _tune_settings(
    tune: bool, epochs: int | None, learning_rate: float | None, *, excluded: dict[str, bool]
) -> TuneSettings | None:
    """Return what the --tune options say; None without them.

    Raises:
        click.UsageError: they say nothing together, or another option excludes them.
    """
    if not tune:
        for name, value in (("--tune-epochs", epochs), ("--tune-lr", learning_rate)):
            if value is not None:
                raise click.UsageError(f"{name} needs --tune block")
        return None
    _refuse_excluded(excluded)
    default = TuneSettings()
    return TuneSettings(epochs or default.epochs, learning_rate or default.learning_rate)


def _refuse_excluded(excluded: dict[str, bool]) -> None:
    for option, there in excluded.items():
        if there:
            raise click.UsageError(f"--tune moves the scales, which {option} fixes; leave one out")


def _print_plan(options: Options, device: str, *, as_json: bool) -> None:
    import torch

    from rlo_gptq.models.fold import check_foldable
    from rlo_gptq.models.outside import find_outside
    from rlo_gptq.models.source import ModelSource, find_model
    from rlo_gptq.pipeline.plan import discover
    from rlo_gptq.pipeline.processes import pick_device

    source = ModelSource(
        find_model(options.model),
        dtype=getattr(torch, options.dtype),
        device=pick_device(device),
        trust_remote_code=options.trust_remote_code,
    )
    folded = None
    if options.rotate is not None:
        family = check_foldable(source.config.to_dict())
        folded = family.rotation if find_outside(source.model)[2] else None
    plan = discover(source, options, folded=folded)
    tuned: dict[str, int] = {}
    if options.end_to_end is not None:
        from rlo_gptq.tuning.memory import plan_tuning

        tuned = plan_tuning(
            source, plan.layout, options.layer, options.end_to_end, offload=options.offload
        )
    source.close()
    document = {
        **plan.summary,
        "seqlen": plan.seqlen,
        "nsamples": options.nsamples,
        "settings": options.layer.to_dict(),
        **{f"tuning_{name}": value for name, value in tuned.items()},
    }
    print_plan(document, as_json=as_json)
