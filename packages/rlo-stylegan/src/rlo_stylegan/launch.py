"""`rlo-stylegan train`: a checkout's train.py with a rooted loss, nothing written to it.

The script is imported as the module that its file is named after, because spawned processes look up
its functions by name there. Its command gains the options, and what it makes of them is caught
where it hands `loss_kwargs` on: the class becomes `rlo_stylegan.factory.patched_loss`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from rlo_stylegan.checkout import LOSS, SCRIPT, Checkout, find_checkout
from rlo_stylegan.errors import CheckoutError
from rlo_stylegan.factory import FACTORY
from rlo_stylegan.flags import OPTIONS, gan_loss_kwargs
from rlo_stylegan.layers import patch_sources
from rlo_stylegan.ledger import Ledger
from rlo_stylegan.record import write_record
from rlo_stylegan.script import Script, read_script


def train(script: str | os.PathLike[str], arguments: Sequence[str]) -> None:
    """Run `python SCRIPT ARGUMENTS...` with `--loss`, `--kparam` and `--mparam` understood.

    The run's own folder gets `run.json` and `metrics.jsonl` beside what the checkout writes there.

    Args:
        script: The checkout's train.py.
        arguments: Its arguments, ours among them.

    Raises:
        CheckoutError: the checkout is not understood; nothing has been imported then.
        SystemExit: as the script's own command ends.
    """
    path = Path(script)
    if path.name != SCRIPT or not path.is_file():
        raise CheckoutError(f"script must be the {SCRIPT} of a checkout, got {str(script)!r}")
    checkout = find_checkout(path)
    if "loss" in Ledger.load(checkout.root).layers:
        raise CheckoutError(
            f"{checkout.root} is patched already: run `python {script} --loss rlo ...`, or "
            "`rlo-stylegan revert` first"
        )
    # For its refusals: nothing of the checkout runs before it is understood.
    patch_sources(checkout, checkout.read(LOSS), checkout.read(SCRIPT))
    shape = read_script(checkout.read(SCRIPT))
    with _without_bytecode():
        sys.path.insert(0, str(checkout.root))
        module = importlib.import_module(path.stem)
        _run(module, shape, checkout, list(arguments), str(script))


@contextmanager
def _without_bytecode() -> Iterator[None]:
    """Keep this process and those it starts from leaving `__pycache__` in the checkout."""
    before = sys.dont_write_bytecode, os.environ.get("PYTHONDONTWRITEBYTECODE")
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    try:
        yield
    finally:
        sys.dont_write_bytecode = before[0]
        if before[1] is None:
            del os.environ["PYTHONDONTWRITEBYTECODE"]
        else:
            os.environ["PYTHONDONTWRITEBYTECODE"] = before[1]


class _Flags:
    """What the user asked for, and the training options that it went into."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.training: Mapping[str, Any] | None = None

    def put_into(self, training: MutableMapping[str, Any]) -> None:
        """Point `loss_kwargs` of some training options at the factory."""
        loss = training["loss_kwargs"]
        loss["base_class"] = loss["class_name"]
        loss["class_name"] = FACTORY
        loss.update(gan_loss_kwargs(**self.values))
        self.training = training


def _run(
    module: ModuleType, shape: Script, checkout: Checkout, arguments: list[str], name: str
) -> None:
    flags = _Flags()
    if shape.shape == "collected":
        _wrap_argument(module, "launch_training", flags)
    else:
        _wrap_result(module, shape.setup, flags)
    status = "failed"
    try:
        if shape.shape == "argparse":
            _argparse_command(module, shape, flags, arguments, name)
        else:
            _click_command(module, shape, flags, arguments, name)
        status = "done"
    except SystemExit as end:
        status = "failed" if end.code else "done"
        raise
    finally:
        folder = Path(flags.training.get("run_dir", "")) if flags.training else None
        if folder is not None and (folder / "stats.jsonl").is_file():
            write_record(folder, folder, checkout=checkout, status=status)


def _click_command(
    module: ModuleType, shape: Script, flags: _Flags, arguments: list[str], name: str
) -> None:
    command = getattr(module, shape.command)

    def keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        flags.values[str(parameter.name)] = value

    for flag, text in OPTIONS:
        command.params.append(
            click.Option(
                [flag],
                help=text,
                metavar="SPEC" if flag == "--loss" else "FLOAT",
                type=str if flag == "--loss" else float,
                default="ce" if flag == "--loss" else None,
                show_default=flag == "--loss",
                expose_value=False,
                callback=keep,
            )
        )
    command.main(args=arguments, prog_name=name)


def _argparse_command(
    module: ModuleType, shape: Script, flags: _Flags, arguments: list[str], name: str
) -> None:
    parser: argparse.ArgumentParser = getattr(module, shape.command)()
    parser.prog = name
    for flag, text in OPTIONS:
        if flag == "--loss":
            parser.add_argument(flag, help=text, default="ce")
        else:
            parser.add_argument(flag, help=text, type=float)
    options = parser.parse_args(arguments)
    for flag, _ in OPTIONS:
        key = flag.lstrip("-")
        flags.values[key] = getattr(options, key)
        delattr(options, key)
    module.main(options)


def _wrap_result(module: ModuleType, name: str, flags: _Flags) -> None:
    """Catch the training options where `name` returns them: alone, or last of a tuple."""
    setup: Callable[..., Any] = getattr(module, name)

    def with_loss(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        flags.put_into(result[-1] if isinstance(result, tuple) else result)
        return result

    setattr(module, name, with_loss)


def _wrap_argument(module: ModuleType, name: str, flags: _Flags) -> None:
    """Catch the training options where they are handed to `name`, as they hold `loss_kwargs`."""
    launch: Callable[..., Any] | None = getattr(module, name, None)
    if launch is None:
        raise CheckoutError(
            f"{SCRIPT} has no function {name}() to catch the options at; `rlo-stylegan apply` "
            f"works on {LOSS} and {SCRIPT} instead"
        )

    def with_loss(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, MutableMapping) and "loss_kwargs" in value:
                flags.put_into(value)
        return launch(*args, **kwargs)

    setattr(module, name, with_loss)
