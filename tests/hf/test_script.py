"""`rlo-hf run SCRIPT`: scripts as they are on disk, the loss in their Trainer or model."""

import json
import os
import textwrap

import pytest
import transformers
from click.testing import CliRunner
from rlo_core.errors import RLOError, SpecError
from rlo_hf.cli import main, split_loss
from rlo_hf.everywhere import adopt
from rlo_hf.script import run_with_loss
from rlo_hf.self_check import SelfCheckError

SETUP = """
import json, pathlib, sys, torch
config = transformers.LlamaConfig(
    vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=32)
rows = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}] * 4
"""
ARGUMENTS = """
args = transformers.TrainingArguments(
    output_dir=sys.argv[1], use_cpu=True, max_steps=1, report_to=[], save_strategy="no",
    disable_tqdm=True, dataloader_pin_memory=False)
"""


def script(tmp_path, body):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(body))
    return path


@pytest.mark.parametrize(
    ("imports", "name"),
    [
        ("import transformers\nfrom transformers import Trainer", "Trainer"),
        ("import transformers\nfrom transformers import Trainer as T", "T"),
        ("import transformers", "transformers.Trainer"),
    ],
)
def test_the_trainer_of_a_script_is_given_the_loss(tmp_path, imports, name):
    path = script(
        tmp_path,
        f"{imports}\n{SETUP}{ARGUMENTS}"
        f"class Own({name}):\n    pass\n"
        "trainer = Own(model=transformers.LlamaForCausalLM(config), args=args,\n"
        "              train_dataset=rows, eval_dataset=rows)\n"
        "trainer.train()\n"
        "metrics = trainer.evaluate()\n"
        "metrics['name'] = trainer.loss_objective.name\n"
        "pathlib.Path(sys.argv[2]).write_text(json.dumps(metrics))\n",
    )
    before = path.read_bytes()
    run_with_loss(str(path), [str(tmp_path / "out"), str(tmp_path / "m.json")], "rlo:k=4")
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["name"] == "rlo:k=4"
    assert metrics["eval_loss"] == metrics["eval_ce"] != metrics["eval_objective"]
    assert path.read_bytes() == before


def test_a_loop_without_a_trainer_gets_the_loss_in_its_model(tmp_path):
    path = script(
        tmp_path,
        f"import transformers\nfrom transformers import AutoModelForCausalLM\n{SETUP}"
        "model = AutoModelForCausalLM.from_config(config)\n"
        "torch.manual_seed(0)\n"
        "ids = torch.randint(3, 37, (2, 8))\n"
        "out = model.train()(ids, labels=ids)\n"
        "evaluated = model.eval()(ids, labels=ids).loss.item()\n"
        "p = out.logits[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None])\n"
        "expected = (2 * (1 - p ** 0.5)).mean().item()\n"
        "found = [out.loss.item(), expected, evaluated, (-p.log()).mean().item()]\n"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps(found))\n",
    )
    run_with_loss(str(path), [str(tmp_path / "m.json")], "rlo:k=2")
    loss, expected, evaluated, ce = json.loads((tmp_path / "m.json").read_text())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert evaluated == pytest.approx(ce, rel=1e-5)


def test_a_trainer_of_another_file_is_given_the_loss(tmp_path):
    (tmp_path / "own_package.py").write_text(
        f"import transformers\n{textwrap.dedent(SETUP)}"
        "def train(folder):\n"
        "    args = transformers.TrainingArguments(output_dir=folder, use_cpu=True, max_steps=1,\n"
        "        report_to=[], save_strategy='no', dataloader_pin_memory=False)\n"
        "    model = transformers.LlamaForCausalLM(config)\n"
        "    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)\n"
        "    trainer.train()\n"
        "    return trainer.loss_objective.name\n"
    )
    path = script(
        tmp_path,
        "import sys, pathlib, own_package\n"
        "pathlib.Path(sys.argv[2]).write_text(own_package.train(sys.argv[1]))\n",
    )
    run_with_loss(str(path), [str(tmp_path / "out"), str(tmp_path / "name")], "rlo:k=4")
    assert (tmp_path / "name").read_text() == "rlo:k=4"


def test_a_loss_of_the_scripts_own_stops_the_first_step_with_its_file_and_line(tmp_path):
    path = script(
        tmp_path,
        f"import transformers\n{SETUP}{ARGUMENTS}"
        "class Own(transformers.Trainer):\n"
        "    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):\n"
        "        loss = model(**inputs).loss\n"
        "        return (loss, None) if return_outputs else loss\n"
        "model = transformers.LlamaForCausalLM(config)\n"
        "Own(model=model, args=args, train_dataset=rows).train()\n"
        "pathlib.Path(sys.argv[2]).write_text('trained')\n",
    )
    words = [str(tmp_path / "out"), str(tmp_path / "done")]
    with pytest.raises(
        SelfCheckError,
        match=r"^the loss that is propagated is [\d.]+, and rlo:k=2 of the same outputs is [\d.]+: "
        r"Own.compute_loss \(.*train.py, line 13\) has a loss of its own; call super\(\) in it, or "
        r"turn this check off with check=False \(--no-check\)$",
    ):
        run_with_loss(str(path), words, "rlo:k=2")
    assert not (tmp_path / "done").exists()
    run_with_loss(str(path), words, "rlo:k=2", check=False)
    assert (tmp_path / "done").exists()


def test_a_launcher_that_trains_in_a_process_of_its_own_is_reached(tmp_path):
    inner = tmp_path / "inner.py"
    inner.write_text(
        f"import transformers\n{textwrap.dedent(SETUP)}{textwrap.dedent(ARGUMENTS)}"
        "model = transformers.LlamaForCausalLM(config)\n"
        "trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)\n"
        "trainer.train()\n"
        "pathlib.Path(sys.argv[2]).write_text(trainer.loss_objective.name)\n"
    )
    path = script(
        tmp_path,
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, {str(inner)!r}, *sys.argv[1:]], check=True)\n",
    )
    run_with_loss(str(path), [str(tmp_path / "out"), str(tmp_path / "name")], "rlo:k=4")
    assert (tmp_path / "name").read_text() == "rlo:k=4"
    assert "RLO_HF_LOSS" not in os.environ


def test_a_run_that_trains_nothing_is_refused(tmp_path):
    path = script(tmp_path, "print('hello')\n")
    with pytest.raises(
        RLOError, match=r"train.py has trained nothing on rlo: no Trainer of transf"
    ):
        run_with_loss(str(path), [], "rlo")


def test_a_trainer_with_an_objective_of_its_own_is_refused(tmp_path):
    trl = pytest.importorskip("trl")
    trainer = object.__new__(trl.RewardTrainer)
    with pytest.raises(
        RLOError, match=r"^RewardTrainer has an objective of its own and takes no loss"
    ):
        adopt(trainer, "rlo")


def test_a_wrong_spec_is_said_before_the_script_runs(tmp_path):
    path = script(tmp_path, "from transformers import Trainer\nraise SystemExit(3)\n")
    with pytest.raises(SpecError, match=r"^unknown loss 'rol'"):
        run_with_loss(str(path), [], "rol")


@pytest.mark.parametrize(
    ("words", "loss", "rest"),
    [
        (("--lr", "1", "--loss", "ce"), "ce", ["--lr", "1"]),
        (("--loss=rlo:k=2", "--x"), "rlo:k=2", ["--x"]),
        (("a", "--", "--loss", "ce"), None, ["a", "--", "--loss", "ce"]),
    ],
)
def test_the_loss_is_taken_out_of_the_arguments(words, loss, rest):
    assert split_loss(words) == (loss, rest)


def test_the_command_gives_the_script_its_own_options(tmp_path):
    path = script(
        tmp_path,
        "import json, os, sys\n"
        "print(sys.argv[1:], json.loads(os.environ['RLO_HF_LOSS'])['loss'])\n",
    )
    result = CliRunner().invoke(main, ["run", str(path), "--help", "--loss", "ce", "--k", "1"])
    assert "['--help', '--k', '1'] ce\n" in result.output
    assert result.exit_code == 1  # it trains nothing
    result = CliRunner().invoke(main, ["run", str(tmp_path / "no.py")])
    assert result.exit_code == 1
    assert "script must be a file" in result.output


def test_transformers_itself_is_left_alone(tmp_path):
    before = {name: vars(transformers.Trainer)[name] for name in ("train", "evaluate", "predict")}
    with pytest.raises(RLOError):
        run_with_loss(str(script(tmp_path, "1\n")), [], "rlo")
    assert before == {name: vars(transformers.Trainer)[name] for name in before}


def test_a_module_is_run_as_python_does(tmp_path, monkeypatch):
    (tmp_path / "a_module_to_run.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = ["run", "-m", "a_module_to_run", "--x", "--loss", "ce"]
    result = CliRunner().invoke(main, words)
    assert "__main__ ['--x']\n" in result.output
