"""Hugging Face's own example scripts, as they are in a checkout: `-m upstream`.

    pytest tests/hf/test_examples.py -m upstream --transformers-checkout FOLDER

FOLDER holds `examples/pytorch`. The batches that a script really trained on are watched, and the
weights that it saved are those of the formula's gradient on them, computed by hand.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from rlo_core.errors import RLOError
from rlo_hf.script import run_with_loss

datasets = pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytestmark = [pytest.mark.upstream, pytest.mark.filterwarnings("ignore")]

METRIC = """import datasets
import evaluate
class Share(evaluate.Metric):
    def _info(self):
        kinds = [datasets.Value({kind!r}), datasets.Sequence(datasets.Value({kind!r}))]
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features(
                {{"predictions": kinds[{lists}[0]], "references": kinds[{lists}[1]]}}))
    def _compute(self, predictions, references, **more):
        share = sum(p == r for p, r in zip(predictions, references)) / len(references)
        return dict.fromkeys({names}, share)
"""
METRICS = {
    "accuracy": ("int32", (0, 0), ["accuracy"]),
    "glue": ("int32", (0, 0), ["accuracy"]),
    "seqeval": (
        "string",
        (1, 1),
        ["overall_precision", "overall_recall", "overall_f1", "overall_accuracy"],
    ),
    "sacrebleu": ("string", (0, 1), ["score"]),
}
FILES = ("--train_file", "{0}", "--validation_file", "{0}")
TRAINER = {
    "language-modeling/run_clm.py": ("llama", "text.txt", "--block_size", "64"),
    "language-modeling/run_clm.py gpt2": ("gpt2", "text.txt", "--block_size", "64"),
    "language-modeling/run_mlm.py": ("bert", "text.txt", "--max_seq_length", "64"),
    "text-classification/run_glue.py": ("bert", "classes.csv"),
    "text-classification/run_classification.py": (
        "bert",
        "classes.csv",
        *("--text_column_names", "sentence", "--label_column_name", "label"),
        *("--metric_name", "accuracy"),
    ),
    "token-classification/run_ner.py": ("bert", "tags.json"),
    "multiple-choice/run_swag.py": ("bert", "choices.json"),
    "translation/run_translation.py": (
        "t5",
        "pairs.json",
        *("--source_lang", "en", "--target_lang", "fr", "--predict_with_generate"),
    ),
}
OWN_LOOP = {
    "text-classification/run_glue_no_trainer.py": ("llama", "classes.csv"),
    "token-classification/run_ner_no_trainer.py": ("llama", "tags.json"),
}
ONE_UPDATE = (
    *("--do_train", "--do_eval", "--max_steps", "1", "--per_device_train_batch_size", "512"),
    *("--optim", "sgd", "--learning_rate", "0.1", "--lr_scheduler_type", "constant"),
    *("--max_grad_norm", "0", "--save_strategy", "no", "--report_to", "none", "--use_cpu"),
)


@pytest.fixture(scope="module")
def examples(request):
    checkout = request.config.getoption("--transformers-checkout")
    if checkout is None:
        pytest.skip("needs --transformers-checkout FOLDER")
    return Path(checkout) / "examples" / "pytorch"


@pytest.fixture(scope="module")
def home(tmp_path_factory, hf):
    """Tiny models with a tokenizer, data of each kind, and metrics that need no hub."""
    home = tmp_path_factory.mktemp("examples")
    special = {"pad": "[P]", "mask": "[M]", "cls": "[C]", "sep": "[S]", "eos": "[E]"}
    tokenizer = hf.byte_tokenizer(
        model_max_length=128, **{f"{name}_token": token for name, token in special.items()}
    )
    for name in ("llama", "gpt2", "bert", "t5"):
        kind = "bert_mlm" if name == "bert" else name
        model = hf.build(kind, vocab_size=len(tokenizer), length=128)
        for ids in ("pad_token_id", "eos_token_id"):
            setattr(model.config, ids, getattr(tokenizer, ids))
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    _write_data(home)
    for name, (kind, lists, names) in METRICS.items():
        (home / name).mkdir()
        source = METRIC.format(kind=kind, lists=lists, names=names)
        (home / name / f"{name}.py").write_text(source)
    return home


def _write_data(home):
    lines = [f"{i} times {j} is {i * j}." for i in range(12) for j in range(12)]
    (home / "text.txt").write_text("\n".join(lines))
    with (home / "classes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "label"])
        writer.writerows([[f"{i} is a number", i % 2] for i in range(24)])
    tags = [
        {"tokens": ["no", str(i)], "ner_tags": ["O", "ODD" if i % 2 else "O"]} for i in range(9)
    ]
    choices = [
        {
            "sent1": f"{i} is",
            "sent2": "a",
            **{f"ending{j}": "number" * (j + 1) for j in range(4)},
            "label": i % 4,
        }
        for i in range(8)
    ]
    pairs = [{"translation": {"en": f"{i} is", "fr": f"{i} est {i}"}} for i in range(9)]
    for name, rows in (("tags", tags), ("choices", choices), ("pairs", pairs)):
        (home / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(home, table, name, out):
    model, data, *more = table[name]
    files = [word.format(home / data) for word in FILES]
    rest = ["--model_name_or_path", home / model, *files, *more, "--output_dir", out]
    return [str(word) for word in rest]


@pytest.mark.parametrize("name", TRAINER)
def test_an_example_with_a_trainer_takes_the_step_of_the_formula(
    examples, home, tmp_path, hf, monkeypatch, name
):
    seen = []
    train = transformers.Trainer.train

    def watched_train(self, *args, **kwargs):
        batches = self.get_batch_samples

        def watched(*args, **kwargs):
            samples = batches(*args, **kwargs)
            if not seen:
                start = {key: value.clone() for key, value in self.model.state_dict().items()}
                seen.extend((start, self.model, dict(samples[0][0])))
            return samples

        self.get_batch_samples = watched
        return train(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "train", watched_train)
    monkeypatch.chdir(home)
    out = tmp_path / "out"
    run_with_loss(
        str(examples / name.split()[0]), [*words(home, TRAINER, name, out), *ONE_UPDATE], "rlo:k=2"
    )
    monkeypatch.undo()
    start, model, batch = seen
    model.load_state_dict(start)
    model.train().zero_grad()
    kind = {"run_clm.py": "llama", "run_translation.py": "t5"}.get(Path(name.split()[0]).name, "")
    hf.rooted_mean([hf.scores_and_labels(model, kind, batch)], 2.0).backward()
    expected = torch.cat(
        [
            (p - 0.1 * p.grad).flatten() if p.grad is not None else p.flatten()
            for p in model.parameters()
        ]
    ).detach()
    moved = expected - torch.cat([p.detach().flatten() for p in model.parameters()])
    trained = type(model).from_pretrained(out)
    got = torch.cat([p.detach().flatten() for p in trained.parameters()])
    assert float((got - expected).norm() / moved.norm()) < 1e-4
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_loss"] == results["eval_ce"] != results["eval_objective"]


@pytest.mark.parametrize("name", OWN_LOOP)
def test_an_example_with_a_loop_of_its_own_trains_on_the_formula(
    examples, home, tmp_path, hf, monkeypatch, name
):
    import accelerate

    outputs, losses = [], []
    backward = accelerate.Accelerator.backward

    def watched(self, loss, **kwargs):
        losses.append(loss.detach().clone())
        return backward(self, loss, **kwargs)

    def keep(module, args, kwargs, output):
        if kwargs.get("labels") is not None and module.training:
            outputs.append((output.logits.detach().clone(), kwargs["labels"]))

    monkeypatch.setattr(accelerate.Accelerator, "backward", watched)
    monkeypatch.chdir(home)
    hook = torch.nn.modules.module.register_module_forward_hook(keep, with_kwargs=True)
    arguments = [*words(home, OWN_LOOP, name, tmp_path / "out"), "--max_train_steps", "3"]
    try:
        run_with_loss(str(examples / name), arguments, "rlo:k=2")
    finally:
        hook.remove()
    assert len(losses) == len(outputs) == 3
    for loss, pair in zip(losses, outputs, strict=True):
        assert loss.item() == pytest.approx(hf.rooted_mean([pair], 2.0).item(), rel=1e-5)


def test_a_loop_over_a_model_with_its_loss_inline_is_refused(examples, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    name = "text-classification/run_glue_no_trainer.py"
    arguments = words(home, {name: ("bert", "classes.csv")}, name, tmp_path / "out")
    with pytest.raises(RLOError, match=r"^BertForSequenceClassification computes its loss inside"):
        run_with_loss(str(examples / name), arguments, "rlo")


@pytest.mark.parametrize(
    "name", ["language-modeling/run_clm.py", "text-classification/run_glue.py"]
)
def test_without_a_loss_the_weights_are_bit_identical_to_pythons(examples, home, tmp_path, name):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for out, runner in (("a", []), ("b", ["-m", "rlo_hf", "run"])):
        arguments = [*words(home, TRAINER, name, tmp_path / out), *ONE_UPDATE]
        command = [sys.executable, *runner, str(examples / name), *arguments]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("a", "b")]
    assert weights[0] == weights[1]
    assert "no --loss" in done.stderr
