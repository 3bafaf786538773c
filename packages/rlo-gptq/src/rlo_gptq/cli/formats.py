"""`rlo-gptq export` and `rlo-gptq import`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import click

from rlo_gptq.cli import options as shared
from rlo_gptq.cli.options import MB


@click.command("export")
@click.argument("folder", type=shared.existing_folder)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["gptq", "compressed-tensors", "gguf"]),
    default="gptq",
    show_default=True,
    help="gptq: for auto-gptq, GPTQModel, transformers; compressed-tensors: for vLLM at any bits; "
    "gguf: for llama.cpp, 4 or 8 bits in groups of 32 columns or multiples.",
)
@click.option("--out", type=shared.new_folder, help="The new folder; by default FOLDER-FORMAT.")
@shared.peers
@shared.verify
@shared.as_json
def export(
    folder: Path, format_: str, out: Path | None, peers: tuple[str, ...], as_json: bool
) -> None:
    """Write the quantized model in FOLDER in a format that other tools read."""
    if peers and format_ == "gguf":
        raise click.UsageError(
            "--verify-with takes no GGUF file; scripts/verify_gguf.py runs it in llama.cpp"
        )
    check_peers(peers, (format_,))
    document = export_and_verify(folder, out, format_, peers)
    click.echo(json.dumps(document, indent=2) if as_json else described(document))


def check_peers(peers: Sequence[str], formats: Sequence[str]) -> None:
    """Refuse peers that are not installed, before anything is written for them."""
    if not peers:
        return
    from rlo_gptq.formats.verify import check_peer

    for peer in peers:
        for name in formats:
            check_peer(cast("Any", peer), name)


def export_and_verify(
    folder: Path, out: Path | None, name: str, peers: Sequence[str], *, again: bool = False
) -> dict[str, Any]:
    """Write a checkpoint in another format, reload it in its peers, and return what was found.

    Args:
        folder: The checkpoint.
        out: The new folder; None is FOLDER-FORMAT.
        name: Of the format.
        peers: Who is to reload it.
        again: Take an export of the same checkpoint as it is.

    Raises:
        RLOError: the format cannot hold it, the folder is in use, or a peer differs.
    """
    from rlo_gptq.formats.export import export_checkpoint, find_export
    from rlo_gptq.formats.verify import verify_export

    out = out or folder.with_name(f"{folder.name}-{name}")
    exported = find_export(folder, out) if again else None
    exported = exported or export_checkpoint(folder, out, format=cast("Any", name))
    checks = [asdict(verify_export(folder, out, cast("Any", peer))) for peer in peers]
    return {**asdict(exported), "folder": str(out), "verified": checks}


def described(document: dict[str, Any]) -> str:
    """Return what `export_and_verify` found, for people."""
    shown = document["checkpoint_format"] or document["format"]
    lines = [
        f"{document['layers']} layers, {document['bytes'] / MB:.1f} MB, {shown}: "
        f"{document['folder']}"
    ]
    lines += [
        f"{check['peer']} {check['version']} ({check['layer']}): logits equal to "
        f"{check['difference']:.2g} of the largest"
        for check in document["verified"]
    ]
    return "\n".join(lines)


@click.command("import")
@click.argument("folder", type=shared.existing_folder)
@click.argument("out", type=shared.new_folder)
@shared.as_json
def import_(folder: Path, out: Path, as_json: bool) -> None:
    """Turn the GPTQ checkpoint in FOLDER, made by any tool, into ours in OUT."""
    from rlo_gptq.formats.import_gptq import import_checkpoint

    imported = import_checkpoint(folder, out)
    if as_json:
        click.echo(json.dumps(asdict(imported), indent=2, default=str))
        return
    settings = imported.settings
    click.echo(
        f"{imported.layers} layers at {settings.bits} bits, group size {settings.group_size}, "
        f"{'symmetric' if settings.sym else 'asymmetric'}: {out}"
    )
