"""Options that several commands of `rlo-gptq` have, in one place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

MB = 1e6


def print_plan(document: dict[str, Any], *, as_json: bool) -> None:
    """Print what would be done, and what it would take."""
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    for name, value in document.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{k}={v}" for k, v in value.items() if v is not None)
        elif name.endswith("_bytes") and value is not None:
            shown = f"{value / MB:,.1f} MB"
        else:
            shown = str(value)
        click.echo(f"{name.replace('_', ' '):28} {shown}")


def both_spellings(name: str, *rest: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return a click option that is known with dashes and with the authors' underscores."""
    flags = [f"--{name}"]
    if "-" in name:
        flags.append(f"--{name.replace('-', '_')}")
    return click.option(*flags, *rest, **attributes)


def _verify(context: click.Context, _: click.Parameter, value: bool) -> None:
    if not value:
        from rlo_gptq.models.digests import unverified

        context.with_resource(unverified())


existing_folder = click.Path(exists=True, file_okay=False, path_type=Path)
new_folder = click.Path(file_okay=False, path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
device = click.option(
    "--device", default="auto", show_default=True, help="auto is the GPU if there is one; cpu, ..."
)
offload = click.option("--offload", is_flag=True, help="Keep activations in a file.")
peers = both_spellings(
    "verify-with",
    "peers",
    type=click.Choice(["transformers", "gptqmodel"]),
    multiple=True,
    help="Reload what was written for others there and compare the logits; repeatable.",
)
verify = click.option(
    "--verify/--no-verify",
    default=True,
    expose_value=False,
    callback=_verify,
    help="Hold checkpoints against the digests that were written with them: on.",
)
save = click.option(
    "--save",
    "folder",
    type=new_folder,
    required=True,
    help="The checkpoint's folder; the same command goes on where it was stopped.",
)
split = click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), help="Of the data."
)


def dtype(help: str) -> Callable[[Any], Any]:
    """Return the option --dtype, whose meaning `help` tells."""
    return click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help=help,
    )
