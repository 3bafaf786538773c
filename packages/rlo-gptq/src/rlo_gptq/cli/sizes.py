"""Sizes as people write them, and options from a YAML file."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import click

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def size_in_bytes(value: str | int) -> int:
    """Return the bytes of 60MB, 1.5GB, 58MiB or 60000000.

    Raises:
        click.BadParameter: it is no size.

    Example:
        >>> size_in_bytes("1.5kB"), size_in_bytes("2KiB")
        (1500, 2048)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?", str(value).strip().lower())
    if found is None:
        raise click.BadParameter(f"must be a size such as 60MB, 1.5GB or 58MiB, got {value!r}")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def _read(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Take a YAML file's values as the defaults of the command's options."""
    if path is None:
        return None
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise click.UsageError(f"{str(path)!r} is no YAML file: {reason}") from error
    if not isinstance(document, dict):
        raise click.UsageError(
            f"{str(path)!r} must hold options, such as wbits: 3, got {type(document).__name__}"
        )
    names = _flags(ctx.command)
    chosen: dict[str, Any] = {}
    for key, value in document.items():
        name = str(key).replace("_", "-")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"{str(path)!r} has an unknown option {str(key)!r}{hint}")
        option = names[name]
        if isinstance(value, dict):
            value = [f"{k}={v}" for k, v in value.items()]
        if option.multiple and not isinstance(value, list):
            value = [value]
        if option.is_flag and not isinstance(value, bool):
            raise click.UsageError(f"{str(path)!r}: {key!s} must be true or false, got {value!r}")
        chosen[str(option.name)] = value
    ctx.default_map = {**(ctx.default_map or {}), **chosen}
    return path


def _flags(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command by their long flags."""
    found = {}
    for option in command.params:
        if isinstance(option, click.Option):
            for flag in option.opts:
                if flag.startswith("--"):
                    found[flag.removeprefix("--").replace("_", "-")] = option
    return found


config = click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read,
    help="YAML file of these options, e.g. `bits: {mlp.down_proj: 4}`; flags go before it.",
)
