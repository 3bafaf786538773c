"""The `rlo` command, called as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rlo_core.cli.groups import FriendlyGroup
from rlo_core.cli.main import main
from rlo_core.errors import RLOError
from rlo_core.runs.record import Run


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["losses", "--help"], ["demo", "--help"], ["report", "--help"]],
)
def test_help_imports_no_torch_and_no_host(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom rlo_core.cli.main import main\n"
        f"sys.argv = ['rlo', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "heavy = {'torch', 'timm', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_help_names_every_command_in_full_and_every_host() -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert "..." not in out.split("Commands:")[1]
    for name in ("demo", "doctor", "losses", "plot", "report"):
        assert f"\n  {name} " in out


def test_losses_lists_names_packages_formulas_and_options() -> None:
    code, out, _ = call("losses")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("rlo "))
    assert "rlo-core" in row
    assert "m (1 - p^(1/k))" in row
    assert "k=3.0, m=None" in row
    code, out, err = call("losses", "--json")
    assert (code, err) == (0, "")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["gce"]["options"] == {"q": 0.7}


@pytest.mark.usefixtures("bad_plugin")
def test_a_broken_plugin_is_listed_with_its_reason() -> None:
    code, out, _ = call("losses", "--json")
    assert code == 0
    broken = next(row for row in json.loads(out) if row["name"] == "bad")
    assert "ZeroDivisionError" in broken["error"]
    code, out, _ = call("--help")
    assert code == 0
    assert "badhost" in out
    code, _, err = call("badhost", "train")
    assert code == 1
    assert err.startswith("Error: host 'badhost' from bad-losses 1.0 failed to import")


def test_doctor_is_content_with_this_installation_and_shows_versions_and_ranges() -> None:
    code, out, _ = call("doctor", "--json")
    checks = {(c["kind"], c["name"]): c for c in json.loads(out)["checks"]}
    ours = [c for key, c in checks.items() if key[0] != "host"]
    assert all(check["ok"] for check in ours)
    assert code == (0 if all(check["ok"] for check in checks.values()) else 1)
    assert {("loss", "rlo"), ("demo part", "digits")} <= set(checks)


@pytest.mark.usefixtures("bad_plugin")
def test_doctor_exits_with_1_and_says_what_fails() -> None:
    code, out, _ = call("doctor")
    assert code == 1
    failed = [line for line in out.splitlines() if "FAILED" in line]
    assert {line.split()[1] for line in failed} >= {"bad", "odd", "badhost"}


def test_doctor_compares_the_versions_a_host_needs(install: Callable[..., None]) -> None:
    source = (
        "from rlo_core.hosts import Host\n"
        "HOST = Host('newhost', 'a host', 'plugin_host:command',\n"
        "            requires={'torch': '>=2.6', 'click': '>=99', 'no-such-dist': '>=1'})\n"
    )
    install(
        "new-host",
        "0.3",
        {"plugin_host": source},
        {"rlo_core.hosts": {"newhost": "plugin_host:HOST"}},
    )
    code, out, _ = call("doctor", "--json")
    check = next(c for c in json.loads(out)["checks"] if c["name"] == "newhost")
    assert code == 1
    assert not check["ok"]
    assert "is not supported (needs >=99)" in check["detail"]
    assert "no-such-dist is not installed (needs >=1)" in check["detail"]


def test_a_host_command_is_reached_through_rlo(install: Callable[..., None]) -> None:
    source = (
        "import click\nfrom rlo_core.hosts import Host\n"
        "HOST = Host('newhost', 'a host', 'plugin_host:command')\n"
        "@click.command()\ndef command():\n    click.echo('here')\n"
    )
    install(
        "new-host",
        "0.3",
        {"plugin_host": source},
        {"rlo_core.hosts": {"newhost": "plugin_host:HOST"}},
    )
    assert call("newhost") == (0, "here\n", "")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_draws_the_losses_it_is_given(tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"links.{suffix}"
    code, out, _ = call("plot", "ce", "rlo:k=8", "--out", str(picture), "--json")
    assert code == 0
    assert json.loads(out) == {"picture": str(picture), "losses": ["ce", "rlo:k=8"]}
    start = picture.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") or b"<?xml" in start


def test_plot_refuses_another_ending_and_an_unknown_loss(tmp_path: Path) -> None:
    code, _, err = call("plot", "--out", str(tmp_path / "a.gif"))
    assert (code, err) == (1, "Error: a picture must end in .png or .svg, got 'a.gif'\n")
    code, _, err = call("plot", "rol")
    assert code == 1
    assert err.startswith("Error: unknown loss 'rol'; did you mean 'rlo'?")


def test_report_writes_beside_a_single_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "one", kind="test", loss="rlo:k=8", seed=0)
    run.log(epoch=0, accuracy=0.1)
    run.log(epoch=1, accuracy=0.5)
    run.finish(accuracy=0.5)
    code, out, _ = call("report", str(tmp_path / "one"), "--json")
    assert code == 0
    page = Path(json.loads(out)["report"])
    assert page == tmp_path / "one" / "report.html"
    assert "rlo:k=8" in page.read_text()
    code, _, err = call("report", str(tmp_path))
    assert (code, err) == (1, f"Error: no run in {str(tmp_path)!r}: run.json is not there\n")


def test_demo_names_the_parts_when_one_is_unknown(tmp_path: Path) -> None:
    code, _, err = call("demo", "nope", "--out", str(tmp_path / "demo"))
    assert code == 1
    assert err.startswith("Error: unknown demo part 'nope'; available: digits")
    assert not (tmp_path / "demo").exists()


def test_usage_errors_exit_with_2_and_interrupts_with_130() -> None:
    assert call("report")[0] == 2
    assert call("nothing")[0] == 2

    @click.group(cls=FriendlyGroup)
    def group() -> None: ...

    @group.command()
    @click.argument("how")
    def fail(how: str) -> None:
        raise {"known": RLOError("known failure"), "stop": KeyboardInterrupt()}[how]

    known = CliRunner().invoke(group, ["fail", "known"])
    assert (known.exit_code, known.stderr) == (1, "Error: known failure\n")
    stopped = CliRunner().invoke(group, ["fail", "stop"])
    assert (stopped.exit_code, stopped.stderr) == (130, "interrupted\n")
