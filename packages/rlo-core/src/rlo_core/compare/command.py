"""`rlo compare`: the options that every host has, and what is done with them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rlo_core.cli.groups import FriendlyGroup
from rlo_core.errors import RLOError
from rlo_core.hosts import Host
from rlo_core.plugins import COMPARERS, find_plugins, load_plugin

if TYPE_CHECKING:
    from rlo_core.compare.task import Task

LOSSES = ("ce", "rlo", "rlo-convex")
K = {"rlo": (1.0, 1.43, 2.0, 3.0, 8.0), "rlo-convex": (3.0, 8.0)}
CRITERIA = ("symmetric", "accuracy", "likelihood", "forward")


@dataclass(frozen=True)
class CompareOptions:
    """What every host's comparison takes; the options of `rlo compare` by their names."""

    losses: tuple[str, ...] = LOSSES
    k: tuple[float, ...] = ()
    seeds: int = 5
    trials: int | None = None
    minutes: float | None = None
    criterion: str | None = None
    storage: str | None = None
    study: str | None = None
    out: Path | None = None
    apply: bool = False
    as_json: bool = False

    def candidates(self) -> tuple[str, ...]:
        """Return the specs that are compared: those with a k for each k, and ce."""
        found = ["ce"]
        for loss in self.losses:
            ks = self.k or K.get(loss, ())
            found += [f"{loss}:k={k:g}" for k in ks] if loss in K else [loss]
        return tuple(dict.fromkeys(found))


class _Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} must be numbers with commas between", param, ctx)
        if any(not n > 0 for n in numbers):
            self.fail(f"{value!r} must be positive numbers", param, ctx)
        return numbers


NUMBERS = _Numbers()


def compare_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every comparison to a host's command, which gets them as `compare`."""
    import functools

    options = [
        click.option("--loss", "losses", multiple=True, metavar="SPEC",
                     help="A loss to compare with ce; several times. "
                     "[default: rlo and rlo-convex]"),
        click.option("--k", type=NUMBERS, default=(), metavar="K,K,...",
                     help="Roots of rlo and rlo-convex.  [default: 1,1.43,2,3,8 and 3,8]"),
        click.option("--seeds", default=5, show_default=True, help="Seeds of the last stage."),
        click.option("--trials", type=click.IntRange(min=1),
                     help="The most runs, all workers together.  [default: 1/4 of the full grid]"),
        click.option("--minutes", type=click.FloatRange(min=0, min_open=True),
                     help="The most minutes of training, all workers together."),
        click.option("--criterion", type=click.Choice(CRITERIA),
                     help="What held-out samples judge a loss by.  [default: symmetric; for "
                     "language models likelihood]"),
        click.option("--storage", metavar="URL",
                     help="A database for the study; any number of workers on any machines may "
                     "join it.  [default: study.db in --out]"),
        click.option("--study", metavar="NAME", help="The study's name there.  [default: --out's]"),
        click.option("--out", type=click.Path(path_type=Path, file_okay=False),
                     help="The folder of study and report.  [default: runs/compare-DATA]"),
        click.option("--apply", is_flag=True, help="Train the choice with all data, and save it."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    ]  # fmt: skip

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        names = CompareOptions.__dataclass_fields__
        own = {name: given.pop(name) for name in names if name in given}
        own["losses"] = own["losses"] or LOSSES
        return command(compare=CompareOptions(**own), **given)

    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


AUTO = {"losses": ("ce", "rlo"), "k": (1.0, 2.0, 3.0, 8.0), "seeds": 2, "trials": 14}
"""What `--loss auto` compares, in at most this many trainings."""


def borrow_options(
    command: click.Command, *, without: tuple[str, ...]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a comparison the arguments and options of a host's training command, but for some."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        kept = [parameter for parameter in command.params if parameter.name not in without]
        own = list(getattr(function, "__click_params__", []))
        function.__click_params__ = own + kept[::-1]  # type: ignore[attr-defined]
        return function

    return decorate


def run_command(task: Task, options: CompareOptions, *, name: str) -> None:
    """Compare, print the verdict, and train the choice where that is asked for."""
    from rlo_core.compare.run import compare

    out = options.out or Path("runs") / f"compare-{name}"
    verdict = compare(task, options, out=out, say=lambda line: click.echo(line, err=True))
    if options.apply:
        click.echo(f"training with {verdict['choice']}", err=True)
        verdict["applied"] = task.apply(verdict["choice"], verdict["rate"], out / "winner")
    if options.as_json:
        click.echo(json.dumps(verdict, indent=2))
        return
    click.echo(verdict["summary"])
    for sentence in verdict["sentences"]:
        click.echo(f"  {sentence}")
    noise = verdict["noise"]
    click.echo(
        f"  wrong labels: about {100 * noise['rate']:.0f} % "
        f"({100 * noise['low']:.0f} to {100 * noise['high']:.0f} %), by held-out disagreement"
    )
    diverged = f", {verdict['diverged']} diverged" if verdict["diverged"] else ""
    click.echo(
        f"{verdict['runs']} runs{diverged} (the full grid has {verdict['full_grid']}), "
        f"{verdict['seconds']:.0f} s; report: {out / 'report.html'}"
    )
    if "applied" in verdict:
        click.echo(f"trained with all data: {verdict['applied']}")


class CompareGroup(FriendlyGroup):
    """`rlo compare`: a command for each host that registers one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(find_plugins(COMPARERS))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in find_plugins(COMPARERS):
            return None
        try:
            return load_comparer(cmd_name).load_command()
        except RLOError as error:
            raise click.ClickException(str(error)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            try:
                rows.append((name, load_comparer(name).summary))
            except RLOError as error:
                rows.append((name, f"broken: {error}"))
        with formatter.section("Hosts"):
            formatter.write_dl(rows)


def load_comparer(name: str) -> Host:
    """Import what a package registered for `rlo compare NAME`: a `Host` with its command.

    Raises:
        SpecError: no such name.
        PluginError: it does not import, or it is no `Host`.
    """
    from rlo_core.errors import PluginError

    found = load_plugin(COMPARERS, name)
    if not isinstance(found, Host):
        raise PluginError(f"comparison {name!r} must be a Host, got {type(found).__name__}")
    return found


@click.group(cls=CompareGroup, context_settings={"help_option_names": ["-h", "--help"]})
def compare() -> None:
    """Find out whether another loss helps on your data.

    Trains losses with rates of their own and paired seeds within a budget, and gives a verdict with
    intervals. A comparison that was stopped goes on when it is started again.
    """


TABLE = Host(
    name="table",
    summary="a CSV or Parquet table with scikit-learn's linear model, LightGBM or XGBoost",
    command="rlo_core.compare.command:table",
)


@click.command("table")
@click.argument("data")
@click.option("--target", metavar="COLUMN", help="The column of labels.  [default: the last]")
@click.option("--model", type=click.Choice(("logistic", "lightgbm", "xgboost")),
              default="logistic", show_default=True)  # fmt: skip
@click.option("--rate", "rates", type=NUMBERS, metavar="R,R,...",
              help="The grid of C, or of the trees' learning rates.")  # fmt: skip
@click.option("--trees", default=100, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--trusted", metavar="FILE", help="A table of the same columns whose labels are right."
)
@compare_options
def table(
    data: str,
    target: str | None,
    model: str,
    rates: tuple[float, ...] | None,
    trees: int,
    trusted: str | None,
    compare: CompareOptions,
) -> None:
    """Compare losses on a table.

    DATA is a .csv, .csv.gz or .parquet file with a header, or sklearn:NAME.
    """
    from rlo_core.compare.table import TableTask
    from rlo_core.compare.table_data import read_table

    try:
        read = read_table(data, target)
        known = None if trusted is None else read_table(trusted, target, like=read)
        task = TableTask(read, model=model, rates=rates, trees=trees, trusted=known)
    except ModuleNotFoundError as error:
        raise RLOError(
            f"a table needs {error.name}; install it with `pip install 'rlo-core[compare]'`"
        ) from error
    name = Path(data).name.partition(".")[0] if ":" not in data else data.partition(":")[2]
    run_command(task, compare, name=f"{name}-{model}")
