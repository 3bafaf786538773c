"""Groups of options: a frozen dataclass declares them, and Click fills it.

@dataclass(frozen=True, kw_only=True)
class Sampling:
    '''Text'''                                   # the heading in --help
    seed: int = option(default=0, help="...")    # --seed

@click.command(cls=GroupedCommand)
@filled("sampling", Sampling)
def command(sampling: Sampling) -> None: ...
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import click

_DECLARED = "click"


def option(
    *flags: str, short: str | None = None, default: Any = None, required: bool = False, **rest: Any
) -> Any:
    """Declare a field of a group as an option.

    Args:
        *flags: Its flags; without any, `--` and the field's name. Each that has a dash inside is
            known with the authors' underscores too.
        short: A further flag, for commands that take the group with `short`.
        default: Of the field and of the option.
        required: The option has no default and must be given.
        **rest: What `click.option` takes.
    """
    if not required:
        rest["default"] = default
    declared = {"flags": flags, "short": short, "rest": {**rest, "required": required}}
    metadata = {_DECLARED: declared}
    if required:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def filled(name: str, group: type[Any], *, short: bool = False) -> Callable[[Any], Any]:
    """Give a command the options of a group; it gets the group, filled, as its argument `name`.

    What the group's own checks refuse (ValueError) is a usage error.
    """

    def add(function: Callable[..., Any]) -> Any:
        declared = dataclasses.fields(group)

        @functools.wraps(function)
        def command(*arguments: Any, **values: Any) -> Any:
            of_group = {field.name: values.pop(_parameter(name, field.name)) for field in declared}
            try:
                values[name] = group(**of_group)
            except ValueError as error:
                raise click.UsageError(str(error)) from error
            return function(*arguments, **values)

        for field in reversed(declared):
            about = field.metadata[_DECLARED]
            flags = list(about["flags"]) or [f"--{field.name.replace('_', '-')}"]
            if short and about["short"]:
                flags.append(about["short"])
            spellings = [spelling for flag in flags for spelling in (flag, _underscored(flag))]
            command = click.option(
                *dict.fromkeys(spellings),
                _parameter(name, field.name),
                cls=GroupedOption,
                heading=(group.__doc__ or name).splitlines()[0].rstrip("."),
                **about["rest"],
            )(command)
        return command

    return add


def was_given(name: str, field: str) -> bool:
    """Say whether the running command was given the option of a group's field."""
    source = click.get_current_context().get_parameter_source(_parameter(name, field))
    return source not in (None, click.core.ParameterSource.DEFAULT)


class GroupedOption(click.Option):
    """An option that knows the heading it stands under."""

    def __init__(self, *arguments: Any, heading: str, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.heading = heading


class GroupedCommand(click.Command):
    """A command whose help shows the options of each group under a heading of its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups in the order of the command, then what is in none."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                heading = parameter.heading if isinstance(parameter, GroupedOption) else "Options"
                sections.setdefault(heading, []).append(record)
        sections["Options"] = sections.pop("Options", [])
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _parameter(group: str, field: str) -> str:
    return f"{group}__{field}"


def _underscored(flag: str) -> str:
    """Return `--some-flag` as `--some_flag`, and a pair of `--on/--off` by its first."""
    names = [part.removeprefix("--") for part in flag.split("/")]
    return "/".join("--" + n.replace("-", "_") for n in names) if "-" in names[0] else flag
