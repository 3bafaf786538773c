"""Options in groups: dataclasses that Click fills."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, fields

import click
import pytest
from click.testing import CliRunner
from rlo_gptq.cli.groups import filled, option, was_given
from rlo_gptq.cli.quantize import quantize
from rlo_gptq.cli.quantize_groups import Grid, Rotation, Rounding
from rlo_gptq.cli.quantize_options import layer_settings
from rlo_gptq.settings import LayerSettings


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is read."""

    seed_value: int = option(default=3, type=click.IntRange(min=0), short="--seed")
    fold: bool = option("--fold-it/--no-fold-it", default=True)

    def __post_init__(self) -> None:
        if self.seed_value == 13:
            raise ValueError("--seed-value must not be 13")


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ([], "3 True False False"),
        (["--fold_it", "--json"], "3 True True True"),
        (["--no_fold_it"], "3 False True False"),
    ],
)
def test_a_group_reaches_the_command_filled(arguments, output):
    @click.command()
    @filled("text", Text)
    @click.option("--json", "as_json", is_flag=True)
    def read(text: Text, as_json: bool) -> None:
        click.echo(f"{text.seed_value} {text.fold} {was_given('text', 'fold')} {as_json}")
        with pytest.raises(FrozenInstanceError):
            text.seed_value = 4

    result = CliRunner().invoke(read, arguments, catch_exceptions=False)
    assert result.output == output + "\n"


def test_a_short_flag_is_only_where_it_is_asked_for():
    @click.command()
    @filled("text", Text, short=True)
    def read(text: Text) -> None: ...

    flags = {flag for parameter in read.params for flag in parameter.opts}
    assert {"--seed-value", "--seed_value", "--seed", "--fold-it", "--fold_it"} <= flags
    without = [p.opts for p in quantize.params if p.name == "end_to_end__steps"]
    assert without == [["--tune-steps", "--tune_steps"]]


def test_what_a_group_refuses_is_a_usage_error():
    @click.command()
    @filled("text", Text)
    def read(text: Text) -> None:
        raise AssertionError

    result = CliRunner().invoke(read, ["--seed_value", "13"])
    assert result.exit_code == 2
    assert "Error: --seed-value must not be 13" in result.output


def test_help_shows_each_group_under_its_heading():
    text = CliRunner().invoke(quantize, ["--help"]).output
    headings = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == [
        "Bits and grids:",
        "Size:",
        "Incoherence:",
        "Rounding:",
        "Calibration:",
        "Tuning:",
        "Tuning the whole model:",
        "Other formats:",
        "Where and how:",
        "Options:",
    ]


def test_options_that_are_left_out_are_the_defaults_of_the_settings():
    assert layer_settings(Grid(), Rounding(), Rotation()) == LayerSettings()
    for group in (Grid, Rounding, Rotation):
        assert {f.name for f in fields(group)} == set(vars(group()))
