"""`rlo-gptq export` and `rlo-gptq import`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import click

_MB = 1e6
_folder = click.Path(exists=True, file_okay=False, path_type=Path)
_new_folder = click.Path(file_okay=False, path_type=Path)


@click.command("export")
@click.argument("folder", type=_folder)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["gptq", "compressed-tensors"]),
    default="gptq",
    show_default=True,
    help="gptq: for auto-gptq, GPTQModel, transformers; compressed-tensors: for vLLM at any bits.",
)
@click.option("--out", type=_new_folder, help="The new folder; by default FOLDER-FORMAT.")
@click.option(
    "--verify-with",
    "--verify_with",
    "peers",
    type=click.Choice(["transformers", "gptqmodel"]),
    multiple=True,
    help="Reload the export there and compare the logits; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def export(
    folder: Path, format_: str, out: Path | None, peers: tuple[str, ...], as_json: bool
) -> None:
    """Write the quantized model in FOLDER in a format that other tools read."""
    from rlo_gptq.export import export_checkpoint
    from rlo_gptq.verify import verify_export

    out = out or folder.with_name(f"{folder.name}-{format_}")
    exported = export_checkpoint(folder, out, format=cast("Any", format_))
    checks = [verify_export(folder, out, cast("Any", peer)) for peer in peers]
    if as_json:
        document = {**asdict(exported), "verified": [asdict(check) for check in checks]}
        click.echo(json.dumps(document, indent=2, default=str))
        return
    shown = exported.checkpoint_format or exported.format
    click.echo(f"{exported.layers} layers, {exported.bytes / _MB:.1f} MB, {shown}: {out}")
    for check in checks:
        click.echo(
            f"{check.peer} {check.version} ({check.layer}): logits equal to {check.difference:.2g} "
            "of the largest"
        )


@click.command("import")
@click.argument("folder", type=_folder)
@click.argument("out", type=_new_folder)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def import_(folder: Path, out: Path, as_json: bool) -> None:
    """Turn the GPTQ checkpoint in FOLDER, made by any tool, into ours in OUT."""
    from rlo_gptq.importing import import_checkpoint

    imported = import_checkpoint(folder, out)
    if as_json:
        click.echo(json.dumps(asdict(imported), indent=2, default=str))
        return
    settings = imported.settings
    click.echo(
        f"{imported.layers} layers at {settings.bits} bits, group size {settings.group_size}, "
        f"{'symmetric' if settings.sym else 'asymmetric'}: {out}"
    )
