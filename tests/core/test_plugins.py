"""Plug-ins of every group are listed without being imported, and cost only their own name."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner
from rlo_core.cli.main import main
from rlo_core.errors import PluginError, SpecError
from rlo_core.plugins import ADAPTER_INITIALIZERS, GROUPS, MODEL_LOADERS, find_plugins, load_plugin

LEFT = (
    "{kind} 'leaving' from leaving 1.0 failed to import (SystemExit: 3); "
    "`rlo doctor` checks every plugin"
)


@pytest.mark.usefixtures("leaving_plugin")
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.kind)
def test_a_plugin_that_exits_is_an_error_of_its_own_name(group):
    assert "leaving" in find_plugins(group)
    assert "plugin_leaving" not in sys.modules
    with pytest.raises(PluginError) as caught:
        load_plugin(group, "leaving")
    assert str(caught.value) == LEFT.format(kind=group.kind)


@pytest.mark.usefixtures("leaving_plugin")
def test_a_plugin_that_exits_does_not_silence_the_commands():
    runner = CliRunner()
    listed = runner.invoke(main, ["losses", "--json"])
    assert listed.exit_code == 0
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows["leaving"]["error"] == LEFT.format(kind="loss")
    assert rows["rlo"]["options"]["k"] == 3.0
    assert "broken: host 'leaving'" in " ".join(runner.invoke(main, ["--help"]).stdout.split())


@pytest.mark.usefixtures("leaving_plugin")
def test_doctor_checks_every_group():
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 1
    checks = json.loads(result.stdout)["checks"]
    failed = {check["kind"] for check in checks if not check["ok"] and check["name"] == "leaving"}
    assert failed == {group.kind for group in GROUPS}
    right = {(check["kind"], check["name"]) for check in checks if check["ok"]}
    assert {("model loader", "rlo-gptq"), ("adapter initializer", "rlo-gptq")} <= right


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(
        SpecError, match=r"^unknown model loader 'rlo-gpt'; did you mean 'rlo-gptq'"
    ):
        load_plugin(MODEL_LOADERS, "rlo-gpt")
    with pytest.raises(SpecError, match=r"^unknown adapter initializer 'x'; available: rlo-gptq "):
        load_plugin(ADAPTER_INITIALIZERS, "x")


def test_an_interrupt_while_importing_is_no_broken_plugin(install):
    install("slow", "1.0", {"plugin_slow": "raise KeyboardInterrupt\n"},
            {"rlo_core.losses": {"slow": "plugin_slow:loss"}})  # fmt: skip
    from rlo_core.plugins import LOSSES

    with pytest.raises(KeyboardInterrupt):
        load_plugin(LOSSES, "slow")
