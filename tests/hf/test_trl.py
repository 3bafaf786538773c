"""TRL's SFTTrainer with a rooted loss: packing, masks, padding-free, metrics, evaluation."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from rlo_core.errors import RLOError

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")


def sft(
    tmp_path,
    hf,
    tokenizer,
    rows,
    *,
    trainer_type=None,
    loss="rlo:k=5",
    peft_config=None,
    slot=None,
    **more,
):
    from rlo_hf.trl import SFTTrainer

    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_length": 32,
        "bf16": False,
        "activation_checkpointing": False,
    }
    base = hf.arguments(tmp_path).to_dict()
    keep = (
        "output_dir",
        "use_cpu",
        "max_steps",
        "report_to",
        "save_strategy",
        "disable_tqdm",
        "max_grad_norm",
        "learning_rate",
        "optim",
        "train_sampling_strategy",
        "dataloader_pin_memory",
    )
    args = hf.arguments_of(trl.SFTConfig, {**{key: base[key] for key in keep}, **options, **more})
    grab = hf.GrabGradients()
    given = {} if trainer_type is trl.SFTTrainer else {"loss": loss, **(slot or {})}
    trainer = (trainer_type or SFTTrainer)(
        model=hf.build("llama"),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[grab],
        peft_config=peft_config,
        **given,
    )
    return trainer, grab


def tokens(hf, count=8):
    """Rows of ids with labels; the first ids of some are ignored."""
    return [
        {"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()}
        for row in hf.examples("llama", count)
    ]


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(("batch", "steps"), [(8, 1), (2, 4)])
def test_an_update_has_the_gradient_of_the_one_mean(
    tmp_path, hf, tokenizer, batch, steps, padding_free
):
    trainer, grab = sft(
        tmp_path,
        hf,
        tokenizer,
        tokens(hf),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        padding_free=padding_free,
        max_length=None if padding_free else 32,
    )
    trainer.train()
    expected = hf.expected_gradient("llama", hf.examples("llama"), 5.0)
    assert hf.relative_error(grab.value, expected) < 3e-6


def test_packed_rows_have_the_gradient_of_their_documents(tmp_path, hf, tokenizer):
    trainer, grab = sft(
        tmp_path,
        hf,
        tokenizer,
        tokens(hf),
        packing=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
    )
    assert len(trainer.train_dataset) < 8
    trainer.train()
    expected = hf.expected_gradient("llama", hf.examples("llama"), 5.0)
    assert hf.relative_error(grab.value, expected) < 3e-6


def test_only_completions_are_trained_on(tmp_path, hf, tokenizer):
    rows = [
        {"prompt": f"w3 w4 w{5 + i}", "completion": " w9" + f" w{10 + i}" * (1 + i % 3)}
        for i in range(8)
    ]
    trainer, grab = sft(tmp_path, hf, tokenizer, rows, completion_only_loss=True)
    trainer.train()
    examples = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [1]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        examples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    assert hf.relative_error(grab.value, hf.expected_gradient("llama", examples, 5.0)) < 3e-6


def test_our_dft_has_the_gradient_of_trls_own(tmp_path, hf, tokenizer):
    ours, got = sft(tmp_path, hf, tokenizer, tokens(hf), loss="dft")
    theirs, expected = sft(
        tmp_path, hf, tokenizer, tokens(hf), trainer_type=trl.SFTTrainer, loss_type="dft"
    )
    ours.train()
    theirs.train()
    assert hf.relative_error(got.value, expected.value) < 1e-6


def test_metrics_are_trls_and_evaluation_is_cross_entropy(tmp_path, hf, tokenizer):
    options = {"per_device_eval_batch_size": 3, "logging_steps": 1}
    ours, _ = sft(tmp_path, hf, tokenizer, tokens(hf), **options)
    theirs, _ = sft(tmp_path, hf, tokenizer, tokens(hf), trainer_type=trl.SFTTrainer, **options)
    got, expected = ours.evaluate(), theirs.evaluate()
    for name in ("eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert got[name] == pytest.approx(expected[name], rel=1e-6)
    pairs = [hf.scores_and_labels(ours.model.eval(), "llama", hf.collate(hf.examples("llama")))]
    logits, labels = pairs[0]
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert got["eval_loss"] == got["eval_ce"] == pytest.approx(ce, rel=1e-5)
    assert got["eval_perplexity"] == pytest.approx(math.exp(ce), rel=1e-5)
    assert got["eval_objective"] == pytest.approx(hf.rooted_mean(pairs, 5.0).item(), rel=1e-5)
    ours.train()
    theirs.train()
    first, other = ours.state.log_history, theirs.state.log_history
    trained = next(record for record in first if "mean_token_accuracy" in record)
    reference = next(record for record in other if "mean_token_accuracy" in record)
    assert trained["entropy"] == pytest.approx(reference["entropy"], rel=1e-6)
    assert trained["loss"] != pytest.approx(reference["loss"], rel=1e-2)


def test_adapters_are_trained(tmp_path, hf, tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer, _ = sft(tmp_path, hf, tokenizer, tokens(hf), peft_config=config)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora_B" in n}
    trainer.train()
    assert all(
        not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before
    )


def test_what_log_probabilities_cannot_give_is_refused(tmp_path, hf, tokenizer):
    from rlo_hf.trl import SFTTrainer

    def foreign(logits, target):
        return logits.sum()

    with pytest.raises(RLOError, match=r"^loss 'foreign' has no link; TRL has per-token log-prob"):
        SFTTrainer(loss=foreign)
    args = trl.SFTConfig(output_dir=str(tmp_path), loss_type="dft", bf16=False, use_cpu=True)
    with pytest.raises(RLOError, match=r"^loss_type='dft' and loss are the same slot; loss='dft'"):
        SFTTrainer(args=args, loss="rlo")
    with pytest.raises(RLOError, match=r"^compute_loss_func and loss are the same slot"):
        SFTTrainer(compute_loss_func=foreign)


def test_the_arguments_are_trls_in_their_order_and_then_the_loss():
    from rlo_hf.trl import SFTTrainer

    theirs = list(inspect.signature(trl.SFTTrainer.__init__).parameters)
    own = ["loss", "check", "linear", "eval_loss", "weight_mean", "weights", "reference_model"]
    assert list(inspect.signature(SFTTrainer.__init__).parameters) == [*theirs, *own]


def test_trls_own_kernel_has_the_same_gradient(tmp_path, hf, tokenizer):
    """`linear="off"`, and the path says so."""
    trainer, grab = sft(tmp_path, hf, tokenizer, tokens(hf), slot={"linear": "off"})
    trainer.train()
    assert trainer.linear_path == "TRL's kernel (linear='off')"
    expected = hf.expected_gradient("llama", hf.examples("llama"), 5.0)
    assert hf.relative_error(grab.value, expected) < 3e-6


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("by", ["weights", "tokens"])
def test_a_column_of_weights_is_followed(tmp_path, hf, tokenizer, padding_free, by):
    rows, spread = tokens(hf), []
    for i, row in enumerate(rows):
        spread.append(torch.linspace(-0.3, 1.0 + i, len(row["labels"])))
        row["loss_weight"] = spread[-1].tolist()
    trainer, grab = sft(
        tmp_path,
        hf,
        tokenizer,
        rows,
        slot={"weight_mean": by},
        padding_free=padding_free,
        max_length=None if padding_free else 32,
    )
    trainer.train()
    model = hf.build("llama").train()
    logits, labels = hf.scores_and_labels(model, "llama", hf.collate(hf.examples("llama")))
    weight = torch.nn.utils.rnn.pad_sequence(spread, batch_first=True)[:, 1:]
    kept = labels != -100
    log_p = logits[kept].log_softmax(-1).gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1)
    total = (weight[kept] * 5 * (1 - (log_p / 5).exp())).sum()
    (total / (weight[kept].sum() if by == "weights" else kept.sum())).backward()
    assert hf.relative_error(grab.value, hf.gradients(model)) < 3e-6


def test_a_gated_loss_is_trained_and_evaluated(tmp_path, hf, tokenizer):
    trainer, grab = sft(tmp_path, hf, tokenizer, tokens(hf), loss="ce*profit:0.02")
    got = trainer.evaluate()
    trainer.train()
    model = hf.build("llama").train()
    logits, labels = hf.scores_and_labels(model, "llama", hf.collate(hf.examples("llama")))
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    ce = ce[labels.flatten() != -100]
    loss = (ce * ((-ce.detach()).exp() > 0.02)).mean()
    loss.backward()
    assert hf.relative_error(grab.value, hf.gradients(model)) < 3e-6
    assert got["eval_objective"] == pytest.approx(loss.item(), rel=1e-5)
    with pytest.raises(
        RLOError, match=r"^a loss with gates needs the fused path, and linear='off'$"
    ):
        sft(tmp_path, hf, tokenizer, tokens(hf), loss="ce*deft", slot={"linear": "off"})


@pytest.mark.slow
def test_trls_own_script_is_trained_on_the_loss(tmp_path, hf, tokenizer, monkeypatch):
    """`rlo-hf run sft.py --loss SPEC`; two updates, the second on moved weights."""
    from rlo_hf.script import run_with_loss

    hf.build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    lines = [json.dumps({"text": f"w3 w4 w{5 + i} w9"}) + "\n" for i in range(8)]
    (tmp_path / "text" / "train.jsonl").write_text("".join(lines))
    script = Path(trl.__file__).with_name("scripts") / "sft.py"
    options = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "text",
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 0.1,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    run_with_loss(str(script), words, "rlo:k=2")
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    losses = [record["loss"] for record in state["log_history"] if "loss" in record]
    ids = [torch.tensor(tokenizer(json.loads(line)["text"])["input_ids"] + [1]) for line in lines]
    batch = hf.collate([{"input_ids": row, "labels": row} for row in ids])
    expected = hf.rooted_mean([hf.scores_and_labels(hf.build("llama"), "llama", batch)], 2.0)
    assert losses[0] == pytest.approx(expected.item(), rel=1e-3)
    assert losses[1] < losses[0]
