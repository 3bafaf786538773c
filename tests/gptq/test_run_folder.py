"""A run's folder: one writer at a time, and a run that was killed anywhere finishes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest
import rlo_gptq.report.page
from click.testing import CliRunner
from rlo_core.runs.folder import LOCK_FILE
from rlo_core.runs.record import RUN_FILE, read_run
from rlo_gptq.cli.main import main
from rlo_gptq.pipeline.work_folder import PARTS, PLAN_FILE, WorkFolder

SMALL = ["--wbits", "4", "--quant", "nearest", "--nsamples", "4", "--seqlen", "32"]


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def command(model, text, out):
    return ["quantize", model, text, *SMALL, "--save", out, "--json"]


@pytest.fixture
def at_its_report(model_folder, text_file, tmp_path):
    """A process that has written a whole checkpoint and hangs before its report."""
    out, model = tmp_path / "q", model_folder("llama-gqa-tied")

    def child() -> None:
        rlo_gptq.report.page.write_page = lambda *_, **__: time.sleep(600)
        run(*command(model, text_file, out))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    deadline = time.monotonic() + 120
    while not (out / RUN_FILE).exists() or read_run(out)["status"] != "done":
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.05)
    yield process, out
    process.kill()
    process.join()


def test_a_second_process_is_refused_by_a_lock_that_a_killed_first_does_not_leave(
    at_its_report, model_folder, text_file
):
    process, out = at_its_report
    refused = run(*command(model_folder("llama-gqa-tied"), text_file, out), code=1)
    assert len(refused.stderr.splitlines()) == 1
    assert f"is being written by process {process.pid} on " in refused.stderr
    assert "choose another folder" in refused.stderr
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (out / "report.html").exists()
    assert not WorkFolder(out, {}).done  # the report is part of it
    made = json.loads(run(*command(model_folder("llama-gqa-tied"), text_file, out)).stdout)
    assert made["resumed_blocks"] == 2
    assert made["layers"] == 14
    assert "down_proj" in (out / "report.html").read_text()
    assert WorkFolder(out, {}).done
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    again = json.loads(run(*command(model_folder("llama-gqa-tied"), text_file, out)).stdout)
    assert again["already_done"] is True


def test_parts_that_a_kill_left_beside_a_complete_model_are_removed(
    model_folder, text_file, tmp_path
):
    arguments = command(model_folder("llama-gqa-tied"), text_file, tmp_path / "q")
    run(*arguments)
    (tmp_path / "q" / PARTS).mkdir()
    (tmp_path / "q" / PARTS / "rest.safetensors").write_bytes(b"")
    run(*arguments)
    assert not (tmp_path / "q" / PARTS).exists()


def test_a_folder_that_holds_nothing_but_a_dead_lock_is_free(tmp_path):
    (tmp_path / LOCK_FILE).write_text("{}")
    WorkFolder(tmp_path, {}).check_free()
    (tmp_path / "other").write_text("")
    with pytest.raises(Exception, match="is not empty and no quantization was begun there"):
        WorkFolder(tmp_path, {}).check_free()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (PLAN_FILE, "[1, 2]", "is no plan of a quantization"),
        (PLAN_FILE, '{"decisions": []}', "is no plan of a quantization"),
        (PLAN_FILE, "{", "is not JSON"),
        (PLAN_FILE, b"\xff\xfe", "is not JSON"),
        (RUN_FILE, "[1]", "must hold an object"),
        (RUN_FILE, "{}", "has no summary of the finished run"),
        (RUN_FILE, '{"summary": 3}', "summary must be an object"),
        (RUN_FILE, "{", "is not JSON"),
    ],
)
def test_a_damaged_file_of_the_run_costs_one_line(
    file, text, message, model_folder, text_file, tmp_path_factory
):
    out = tmp_path_factory.getbasetemp() / "damaged-run" / "q"
    arguments = command(model_folder("llama-gqa-tied"), text_file, out)
    if not out.exists():
        run(*arguments)
    good = (out / file).read_bytes()
    (out / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused = run(*arguments, code=1)
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    (out / file).write_bytes(good)
    assert json.loads(run(*arguments).stdout)["already_done"] is True
