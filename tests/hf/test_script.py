"""`rlo-hf run SCRIPT`: scripts as they are on disk, the loss in their Trainer or model."""

import ast
import json
import textwrap

import pytest
import transformers
from click.testing import CliRunner
from rlo_core.errors import SpecError
from rlo_core.launch import ScriptError
from rlo_hf.cli import main, split_loss
from rlo_hf.script import run_with_loss, with_loss

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


def test_trls_trainer_is_found_too():
    tree = with_loss(ast.parse("from trl import SFTConfig, SFTTrainer\nSFTTrainer()"), loss="rlo")
    assert "bound_trainer('SFTTrainer', 'rlo')" in ast.unparse(tree)


def test_an_import_inside_a_block_is_followed_there():
    source = "def main():\n    from transformers import Seq2SeqTrainer\n    return Seq2SeqTrainer"
    lines = ast.unparse(with_loss(ast.parse(source), loss="rlo")).splitlines()
    assert lines[2].startswith("    Seq2SeqTrainer = ")


def test_a_script_without_a_slot_is_refused():
    with pytest.raises(ScriptError, match=r"^script must import Trainer, Seq2SeqTrainer or SFTTra"):
        with_loss(ast.parse("print('hello')"), loss="rlo")


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
        "import sys\nfrom transformers import Trainer\n"
        "print(sys.argv[1:], vars(Trainer)['__init__'].keywords['loss'])\n",
    )
    result = CliRunner().invoke(main, ["run", str(path), "--help", "--loss", "ce", "--k", "1"])
    assert result.exit_code == 0, result.output
    assert result.output == "['--help', '--k', '1'] ce\n"
    result = CliRunner().invoke(main, ["run", str(tmp_path / "no.py")])
    assert result.exit_code == 1
    assert "script must be a file" in result.output


def test_transformers_itself_is_left_alone():
    assert transformers.Trainer.__module__ == "transformers.trainer"
