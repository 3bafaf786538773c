"""The commands `timm`, `rlo-timm`, `rlo timm` and `python -m rlo_timm`: one group.

A first word that is no subcommand is a script: `timm train.py ARGS...`. Importing this module
imports no torch.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import click
from rlo_core.cli.groups import FriendlyGroup
from rlo_core.launch import ScriptError

from rlo_timm.train_command import evaluate, prepare, push, train


class ScriptGroup(FriendlyGroup):
    """A group whose first word may also be a script to run."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take the subcommand, or `run` for a script."""
        if args and self.get_command(ctx, args[0]) is None and _is_script(args[0]):
            return "run", run, args
        return super().resolve_command(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show both forms."""
        formatter.write_usage(ctx.command_path, "train.py [ARGS]... --loss SPEC")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...")


def _is_script(word: str) -> bool:
    return not word.startswith("-") and (word.endswith(".py") or Path(word).is_file())


@click.group(cls=ScriptGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("rlo-timm"), prog_name="rlo-timm")
def main() -> None:
    """Rooted logistic objectives in timm.

    `timm train.py ARGS... --loss SPEC` runs your train.py, as it is on disk, with the loss of your
    choice; its own `--help` lists our options too. `rlo-timm train` needs no script.
    """


@main.command(
    add_help_option=False,
    hidden=True,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(script: str, args: tuple[str, ...]) -> None:
    """Run timm's train.py with a loss slot."""
    from rlo_core.launch import run_script

    from rlo_timm.launcher.train_script import transform

    if not Path(script).is_file():
        raise ScriptError(
            f"script must be a file, got {script!r}, which is not there: timm's train.py is not "
            "part of the timm package; clone huggingface/pytorch-image-models from GitHub at the "
            f"release you want (timm {version('timm')} is installed) and run it there. "
            "`rlo-timm train` needs no script"
        )
    try:
        run_script(script, args, transform=transform)
    except ScriptError as error:
        raise ScriptError(f"{script}: {error}") from error


main.add_command(train)
main.add_command(evaluate)
main.add_command(push)
main.add_command(prepare)


def launch() -> None:
    """Enter as `timm`."""
    main(prog_name="timm")
