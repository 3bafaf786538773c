"""`loss_weight`, `weights=` and gates in the Trainer: the gradient against the formula."""

import math

import pytest
import torch
import transformers
from rlo_core.errors import DataError, SpecError
from rlo_hf import Seq2SeqTrainer, Trainer
from rlo_hf.weights import WeightCollator


def weighted(hf, name, kind):
    """Rows with weights, some negative; and for each row its weight per label."""
    rows, spread = hf.examples(name), []
    for i, row in enumerate(rows):
        n = len(row["labels"]) if hasattr(row["labels"], "__len__") else 1
        if kind == "sample":
            row["loss_weight"] = (1.5, -0.5, 2.0, 0.25)[i % 4]
            spread.append(torch.full((n,), row["loss_weight"]))
        else:
            spread.append(torch.linspace(-0.3, 1.0 + i, n))
            row["loss_weight"] = spread[-1].tolist()
    return rows, spread


def oracle(hf, name, rows, spread, k, *, by="weights"):
    """The gradient of sum(w k (1 - p^(1/k))) / sum(w) over every kept label of the window."""
    model = hf.build(name).train()
    batch = hf.collate([{key: row[key] for key in row if key != "loss_weight"} for row in rows])
    logits, labels = hf.scores_and_labels(model, name, batch)
    weight = torch.nn.utils.rnn.pad_sequence(spread, batch_first=True)
    if name == "llama":
        weight = weight[:, 1:]
    if labels.dim() == 1:
        weight = weight[:, 0]
    kept = labels != -100
    log_p = logits[kept].log_softmax(-1).gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1)
    total = (weight[kept] * k * (1 - (log_p / k).exp())).sum()
    (total / (weight[kept].sum() if by == "weights" else kept.sum())).backward()
    return hf.gradients(model)


@pytest.mark.parametrize("linear", ["off", "auto"])
@pytest.mark.parametrize(("batch", "steps"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("kind", ["sample", "token"])
@pytest.mark.parametrize("name", ["llama", "t5", "bert_sequence"])
def test_weights_multiply_and_the_mean_divides_by_their_sum(
    tmp_path, hf, name, kind, batch, steps, linear
):
    if (name == "bert_sequence" and kind == "token") or (name != "llama" and linear == "auto"):
        pytest.skip("one label a row, or no fused path")
    rows, spread = weighted(hf, name, kind)
    args = hf.arguments(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps
    )
    grab = hf.GrabGradients()
    trainer = Trainer(
        hf.build(name), args, hf.collate, rows, loss="rlo:k=5", linear=linear, callbacks=[grab]
    )
    trainer.train()
    assert hf.relative_error(grab.value, oracle(hf, name, rows, spread, 5.0)) < 3e-6


def test_the_mean_can_divide_by_the_kept_tokens(tmp_path, hf):
    rows, spread = weighted(hf, "llama", "token")
    args = hf.arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    got = hf.update_of(Trainer, hf.build("llama"), rows, args, loss="rlo:k=5", weight_mean="tokens")
    expected = oracle(hf, "llama", rows, spread, 5.0, by="tokens")
    assert hf.relative_error(got, expected) < 3e-6


def test_the_column_survives_the_removal_of_unused_columns(tmp_path, hf):
    datasets = pytest.importorskip("datasets")
    rows, spread = weighted(hf, "llama", "sample")
    plain = [{key: value.tolist() if isinstance(value, torch.Tensor) else value
              for key, value in row.items()} for row in rows]  # fmt: skip

    def collate(features):
        return hf.collate([{key: torch.tensor(row[key]) for key in row} for row in features])

    grab = hf.GrabGradients()
    args = hf.arguments(tmp_path, remove_unused_columns=True)
    data = datasets.Dataset.from_list(plain)
    Trainer(hf.build("llama"), args, collate, data, loss="rlo:k=5", callbacks=[grab]).train()
    assert hf.relative_error(grab.value, oracle(hf, "llama", rows, spread, 5.0)) < 3e-6


def test_weights_lie_where_the_collator_laid_the_tokens():
    """Left padding, and rows end to end."""
    rows = [{"input_ids": [1, 2], "labels": [1, 2], "loss_weight": [0.5, 2.0]},
            {"input_ids": [3, 4, 5], "labels": [3, 4, 5], "loss_weight": 3.0}]  # fmt: skip

    def left(features):
        ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
        return {"labels": ids, "attention_mask": (ids > 0).long()}

    def flat(features):
        return {"labels": torch.tensor([[1, 2, 3, 4, 5]])}

    assert WeightCollator(left)(rows)["loss_weight"].tolist() == [[0, 0.5, 2], [3, 3, 3]]
    assert WeightCollator(flat)(rows)["loss_weight"].tolist() == [[0.5, 2, 3, 3, 3]]
    flattened = WeightCollator(transformers.DataCollatorWithFlattening())(rows)
    assert flattened["loss_weight"].shape == flattened["labels"].shape
    with pytest.raises(
        DataError, match=r"^loss_weight must be a number or one for each of the row"
    ):
        WeightCollator(flat)([{**rows[0], "loss_weight": [1.0]}, rows[1]])
    with pytest.raises(DataError, match=r"^every row must have 'loss_weight', or none$"):
        WeightCollator(flat)([{"input_ids": [1], "labels": [1]}, rows[1]])


@pytest.mark.parametrize("linear", ["off", "fused"])
def test_a_function_of_the_batch_and_its_statistics_weighs_each_token(tmp_path, hf, linear):
    """Focal-like: (1 - p)^2, without gradient."""
    rows, args = hf.examples("llama"), hf.arguments(tmp_path)

    def focal(batch, stats):
        assert "input_ids" in batch
        assert stats.entropy.shape == stats.top1.shape == stats.ce.shape
        return (1 - stats.p) ** 2

    got = hf.update_of(
        Trainer, hf.build("llama"), rows, args, loss="ce", weights=focal, linear=linear
    )
    model = hf.build("llama").train()
    logits, labels = hf.scores_and_labels(model, "llama", hf.collate(rows))
    kept = labels != -100
    log_p = logits[kept].log_softmax(-1).gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1)
    ((1 - log_p.exp().detach()) ** 2 * -log_p).mean().backward()
    assert hf.relative_error(got, hf.gradients(model)) < 3e-6
    with pytest.raises(
        DataError, match=r"^weights must return one number for each of the \d+ kept"
    ):
        hf.update_of(
            Trainer, hf.build("llama"), rows, args, loss="ce", weights=lambda batch, stats: 1.0
        )


@pytest.mark.parametrize("linear", ["off", "fused"])
@pytest.mark.parametrize("spec", ["ce*eaft:k=5", "rlo:k=5*profit:0.02", "ce*topk:0.5"])
def test_a_gated_loss_trains_on_either_path_as_its_formula(tmp_path, hf, spec, linear):
    rows, args = hf.examples("llama"), hf.arguments(tmp_path)
    trainer_args = {"loss": spec, "linear": linear}
    got = hf.update_of(Trainer, hf.build("llama"), rows, args, **trainer_args)
    model = hf.build("llama").train()
    logits, labels = hf.scores_and_labels(model, "llama", hf.collate(rows))
    kept = labels != -100
    log_p = logits[kept].log_softmax(-1)
    own = log_p.gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1)
    ce, p = -own, own.exp().detach()
    if "eaft" in spec:
        top = log_p.detach().topk(5).values.log_softmax(-1)
        loss = ce * (-(top.exp() * top).sum(-1) / math.log(5))
    elif "profit" in spec:
        loss = 5 * (1 - own.exp() ** 0.2) * (p > 0.02)
    else:
        count = round(0.5 * len(ce))
        chosen = ce.detach() >= ce.detach().topk(count).values[-1]
        loss = ce * chosen * len(ce) / count
    loss.mean().backward()
    assert hf.relative_error(got, hf.gradients(model)) < 3e-6


def test_a_gated_loss_evaluates_to_its_objective_beside_cross_entropy(tmp_path, hf):
    rows = hf.examples("llama")
    trainer = Trainer(
        hf.build("llama"), hf.arguments(tmp_path), hf.collate, rows, rows, loss="ce*profit:0.02"
    )
    got = trainer.evaluate()
    with torch.no_grad():
        logits, labels = hf.scores_and_labels(trainer.model, "llama", hf.collate(rows))
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    ce = ce[labels.flatten() != -100]
    assert got["eval_objective"] == pytest.approx((ce * ((-ce).exp() > 0.02)).mean().item())
    assert got["eval_ce"] == pytest.approx(ce.mean().item())


def test_what_weights_and_gates_cannot_do_is_refused(tmp_path, hf):
    model, args = hf.build("llama"), hf.arguments(tmp_path)
    with pytest.raises(
        SpecError, match=r"needs the losses of a reference model, which the trainers"
    ):
        Trainer(model, args, loss="ce*rho")
    with pytest.raises(SpecError, match=r"^weights= needs a loss with a link"):
        Trainer(model, args, loss=lambda logits, target: logits.sum(), weights=lambda b, r: r.p)
    with pytest.raises(ValueError, match=r"^weight_mean must be 'weights' or 'tokens', got 'sum'$"):
        Trainer(model, args, weight_mean="sum")


def test_generation_in_evaluation_leaves_the_column_out(tmp_path, hf):
    rows, _ = weighted(hf, "t5", "sample")
    args = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], predict_with_generate=True,
        remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(hf.build("t5"), args, hf.collate, rows, rows, loss="rlo")
    assert trainer.evaluate()["eval_ce"] > 0
