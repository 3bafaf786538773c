"""The commands, as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import rlo_gptq
import torch
import transformers
from click.testing import CliRunner
from rlo_core.runs.record import read_metrics, read_run
from rlo_gptq.cli.main import main
from rlo_gptq.pipeline.progress import Bar


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def made(model_folder, text_file, tmp_path_factory):
    """The folder and the document of `quantize --json`."""
    out = tmp_path_factory.mktemp("made") / "q"
    arguments = ["quantize", model_folder("llama-gqa-tied"), text_file, "--wbits", 4, "--quant"]
    arguments += ["ldlqRG", "--incoh_processing", "--nsamples", 4, "--seqlen", 32, "--npasses", 2]
    return out, json.loads(run(*arguments, "--save", out, "--json").stdout)


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom rlo_gptq.cli.main import main\n"
        "for command in ('quantize', 'eval', 'inspect', 'compare'):\n"
        "    main([command, '--help'], standalone_mode=False)\n"
        "print([m for m in sys.modules if m in ('torch', 'transformers')], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert "--incoh_processing" in done.stdout
    assert "--incoh-processing" in done.stdout


def test_quantize_prints_one_document_and_writes_a_run_and_a_report(made):
    out, document = made
    assert document["layers"] == 14
    assert document["bits"] == 4
    assert 0 < document["mean_proxy"] <= document["worst_proxy"] < 0.05
    assert document["bytes"] == (out / "model.safetensors").stat().st_size
    run_document = read_run(out)
    assert run_document["kind"] == "gptq quantize"
    assert run_document["options"]["layer"]["rescale"] is True
    assert run_document["options"]["layer"]["incoherence"] == "hadamard"
    layers = [record["layer"] for record in read_metrics(out)]
    assert len(layers) == 14 + 1  # the tied embedding comes last
    assert layers[-1] == "model.embed_tokens"
    assert "model.layers.1.mlp.down_proj" in layers
    assert "down_proj" in (out / "report.html").read_text()


def test_quantizing_again_says_that_it_is_done(made, model_folder, text_file):
    out, document = made
    arguments = ["quantize", model_folder("llama-gqa-tied"), text_file, "--wbits", 4]
    arguments += ["--incoh-processing", "--nsamples", 4, "--seqlen", 32, "--npasses", 2]
    again = json.loads(run(*arguments, "--save", out, "--json").stdout)
    assert again["already_done"] is True
    assert again["worst_layer"] == document["worst_layer"]
    assert run(*arguments, "--save", out).stdout.startswith("complete already: 14 layers at 6.")


def test_another_setting_in_the_same_folder_is_one_line_and_status_1(made, model_folder, text_file):
    arguments = ["quantize", model_folder("llama-gqa-tied"), text_file, "--wbits", 3]
    result = run(*arguments, "--nsamples", 4, "--seqlen", 32, "--save", made[0], code=1)
    assert result.stderr.startswith("Error: ")
    assert "was begun with other settings (layer was" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_dry_run_prints_plan_memory_and_time_and_writes_nothing(model_folder, text_file, tmp_path):
    arguments = ["quantize", model_folder("mixtral"), text_file, "--save", tmp_path / "q"]
    document = json.loads(run(*arguments, "--dry-run", "--json").stdout)
    assert document["layers"] == 20
    assert document["blocks"] == 2
    assert document["seqlen"] == 64
    assert document["peak_memory_bytes"] > document["block_bytes"] > 0
    assert document["estimated_seconds"] > 0
    assert document["settings"]["method"] == "ldlqRG"
    assert "peak memory bytes" in run(*arguments, "--dry_run").stdout
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("options", "incoherence", "rescale"),
    [
        ([], "hadamard", True),
        (["--groupsize", 16, "--wbits", 2], "hadamard", True),
        (["--wbits", 3], "none", False),
        (["--incoherence", "none"], "none", False),
        (["--incoherence", "kronecker"], "kronecker", False),
        (["--rotate", "fold"], "none", False),
        (["--asym"], "none", False),
        (["--qfn", "b"], "none", False),
        (["--compat", "quip"], "none", False),
        (["--format", "gptq"], "none", False),
    ],
)
def test_two_bits_take_what_is_recommended_and_say_so(
    options, incoherence, rescale, model_folder, text_file, tmp_path
):
    arguments = ["quantize", model_folder("llama-gqa-tied"), text_file, "--save", tmp_path / "q"]
    result = run(*arguments, *options, "--dry-run", "--json")
    settings = json.loads(result.stdout)["settings"]
    assert (settings["incoherence"], settings["rescale"]) == (incoherence, rescale)
    said = "2 bits: incoherence processing is on, as recommended" in result.stderr
    assert said == rescale


def test_eval_prints_the_perplexity_of_both_models(made, text_file):
    arguments = ["eval", made[0], text_file, "--context", 32, "--max-tokens", 320, "--original"]
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["perplexity"] == pytest.approx(document["original_perplexity"], rel=0.2)
    assert document["tokens"] == 310
    assert document["context"] == 32
    assert document["bytes"] < document["original_bytes"]


def test_inspect_lists_the_layers_with_their_errors(made):
    document = json.loads(run("inspect", made[0], "--json").stdout)
    assert document["layers"][0]["layer"] == "model.embed_tokens"
    assert document["layers"][1]["layer"].startswith("model.layers.0.")
    assert len(document["layers"]) == 14 + 1
    assert [layer["bits"] for layer in document["layers"]] == [8] + 14 * [4]
    assert all(layer["proxy"] < 0.05 for layer in document["layers"])
    assert document["settings"]["bits"] == 4
    assert "model.layers.1.mlp.up_proj" in run("inspect", made[0]).stdout


def test_compare_tabulates_and_draws(made, model_folder, text_file, tmp_path):
    arguments = ["compare", made[0], model_folder("llama-gqa-tied"), "--dataset", text_file]
    arguments += ["--context", 32, "--max-tokens", 320]
    rows = json.loads(run(*arguments, "--json", "--plot", tmp_path / "p.svg").stdout)
    assert [row["bits"] for row in rows] == [4, None]
    assert rows[0]["bytes"] < rows[1]["bytes"]
    assert rows[0]["quantize_seconds"] > 0
    assert (tmp_path / "p.svg").stat().st_size > 1000
    assert "perplexity" in run("compare", made[0]).stdout


def test_the_calibration_text_as_evaluation_text_is_warned_of(
    made, model_folder, text_file, tmp_path
):
    other = tmp_path / "other.txt"
    other.write_text("a house " * 300)
    limits = ["--context", 32, "--max-tokens", 64]
    warning = f"warning: {made[0]} was calibrated or tuned on this very text"
    assert warning in run("eval", made[0], text_file, *limits).stderr
    assert "warning" not in run("eval", made[0], other, *limits).stderr
    compared = run("compare", made[0], model_folder("llama-gqa-tied"), "--dataset", text_file)
    assert compared.stderr.count("warning") == 1
    assert json.loads(run("eval", made[0], text_file, *limits, "--json").stdout)["calibrated_on_it"]


def test_compare_names_what_differs_and_inspect_what_the_losses_are_of(
    made, model_folder, text_file, tmp_path
):
    arguments = ["quantize", model_folder("llama-gqa-tied"), text_file, "--wbits", 4, "--quant"]
    arguments += ["nearest", "--groupsize", 8, "--nsamples", 4, "--seqlen", 32, "--tune"]
    run(*arguments, "--tune-epochs", 1, "--save", tmp_path / "q")
    columns = run("compare", made[0], tmp_path / "q").stdout.splitlines()[0].split()
    assert columns == [
        *("model", "bits", "method", "incoherence", "groups", "tune"),
        *("MB", "perplexity", "seconds"),
    ]
    assert "before tuning (block)" in run("inspect", tmp_path / "q").stdout
    assert "tuning" not in run("inspect", made[0]).stdout


def test_a_command_whose_stderr_is_no_terminal_draws_no_bars(made, text_file):
    """Those of transformers, which would fill a log; needs a process of its own."""
    command = [sys.executable, "-m", "rlo_gptq", "eval", str(made[0]), str(text_file)]
    done = subprocess.run([*command, "--max-tokens", "64"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr
    assert [line[:8] for line in done.stderr.splitlines()] == ["warning:"]  # calibrated on it


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["eval", "no/such/model", "text.txt"], 1, "no model at 'no/such/model': no such folder"),
        (["eval", "."], 2, "give a DATASET, or --tasks"),
        (["compare", ".", "--plot", "a.svg"], 2, "--plot needs --dataset"),
        (
            ["quantize", "m", "d", "--unbiased", "--npasses", "3", "--save", "x"],
            2,
            "npasses must be 0 with unbiased rounding, got 3",
        ),
        (["quantize", "m", "d"], 2, "Missing option '--save'"),
        (
            ["quantize", "m", "d", "--compat", "quip", "--lazy_batch", "--save", "x"],
            2,
            "npasses must be positive with lazy_batch and compat 'quip', got 0",
        ),
        (["compare", ".", "--dataset", "d", "--plot", "a.gif"], 2, "must end in .png or .svg, got"),
    ],
)
def test_known_failures_are_one_line_and_usage_errors_status_2(arguments, code, message):
    assert message in run(*arguments, code=code).stderr


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_a_device_that_is_not_there_is_refused_in_one_line(
    command, device, made, model_folder, text_file, tmp_path
):
    model = made[0] if command == "eval" else model_folder("llama-gqa-tied")
    arguments = [command, model, text_file, "--device", device]
    arguments += ["--save", tmp_path / "q"] if command == "quantize" else []
    result = run(*arguments, code=1)
    assert result.stderr.startswith(f"Error: device {device!r} cannot be used: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "q").exists()


def test_a_window_longer_than_a_table_of_positions_is_refused(model_folder, text_file):
    result = run("eval", model_folder("opt"), text_file, "--context", 65, code=1)
    assert result.stderr.endswith("Error: context must be at most the model's 64, got 65\n")


def test_a_model_that_is_not_there_is_refused_before_the_others_are_evaluated(made, text_file):
    arguments = [made[0], text_file, "--original", "/no/such/model", "--context", 32]
    result = run("eval", *arguments, code=1)
    assert result.stderr == "Error: no model at '/no/such/model': no such folder\n"
    assert "original_perplexity" not in result.stdout


def test_tasks_without_lm_eval_say_what_to_install(made):
    if __import__("importlib.util").util.find_spec("lm_eval"):
        pytest.skip("lm-eval is installed")
    result = run("eval", made[0], "--tasks", "arc_easy", code=1)
    assert "pip install 'rlo-gptq[lm-eval]'" in result.stderr


TASK = """
task: red_or_not
dataset_path: json
dataset_kwargs: {data_files: {test: %s}, cache_dir: %s}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
metadata: {version: 1}
"""


def test_a_task_of_ones_own_is_evaluated_by_lm_eval(made, tmp_path):
    """Really run, offline; the oracle is the two choices' summed log-likelihoods."""
    pytest.importorskip("lm_eval")
    rows = [{"question": q, "choices": [" red", " sun"], "answer": 0} for q in ("the", "a ball")]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "red.yaml").write_text(TASK % (data, tmp_path / "cache"))
    arguments = ["--tasks", "red_or_not", "--include-path", tmp_path / "tasks", "--json"]
    result = json.loads(run("eval", made[0], *arguments).stdout)["tasks"]["red_or_not"]
    model = rlo_gptq.load(made[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(made[0])
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            before = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor([tokenizer(row["question"] + choice)["input_ids"]])
            with torch.no_grad():
                log = model(ids).logits.log_softmax(-1)[0, before - 1 : -1]
            scores.append(float(log.gather(1, ids[0, before:, None]).sum()))
        right += scores[0] > scores[1]
    assert result["acc,none"] == right / len(rows)


@pytest.mark.slow
def test_torchrun_with_two_processes_makes_a_model(model_folder, text_file, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "rlo_gptq", "quantize", str(model_folder("llama-gqa-tied")), str(text_file)]
    command += ["--nsamples", "4", "--seqlen", "32", "--save", str(tmp_path / "q"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == 14


def test_the_bar_says_which_block_is_at_work_and_ends_full():
    with Bar([]) as bar:
        task = bar.bar.tasks[0]
        assert (task.description, task.fields["at"]) == ("prepare", "")
        bar.block(1, 2, "quantize")
        assert (task.description, task.fields["at"]) == ("quantize", "block 2 of 2")
        assert (task.completed, task.total) == (1, 2)
    assert (task.completed, task.description) == (2, "done")
