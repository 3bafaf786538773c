"""`Trainer(loss=...)`: the gradient of an update against the formula, for every task."""

import functools
import logging
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from rlo_core import RootedLoss, SpecError, rooted_loss
from rlo_core.errors import RLOError
from rlo_hf import Seq2SeqTrainer, Trainer, rlo

CAUSAL = ("gpt2", "opt", "llama", "qwen2", "gemma2", "cohere", "granite")
SEQ2SEQ = ("t5", "bart")
OTHER = ("bert_mlm", "bert_token", "bert_sequence", "bert_multi_label", "vit")


@pytest.mark.parametrize(("batch", "steps"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ, *OTHER])
def test_an_update_has_the_gradient_of_the_one_mean_over_all_labels(
    tmp_path, hf, name, batch, steps
):
    rows = hf.examples(name)
    args = hf.arguments(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps
    )
    got = hf.update_of(Trainer, hf.build(name), rows, args, loss="rlo:k=5", linear="off")
    assert hf.relative_error(got, hf.expected_gradient(name, rows, 5.0)) < 3e-6


@pytest.mark.parametrize("name", CAUSAL)
def test_the_fused_path_has_the_same_gradient_and_holds_no_logits(tmp_path, hf, name, monkeypatch):
    rows, model, widths = hf.examples(name), hf.build(name), set()
    forward = type(model).forward

    @functools.wraps(forward)
    def watched(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            widths.add(output.logits.shape[-1])
        return output

    monkeypatch.setattr(type(model), "forward", watched)
    args = hf.arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    got = hf.update_of(Trainer, model, rows, args, loss="rlo:k=5", linear="fused")
    monkeypatch.undo()
    assert widths == {1}
    assert hf.relative_error(got, hf.expected_gradient(name, rows, 5.0)) < 2e-6


def test_an_update_of_cross_entropy_is_that_of_the_stock_trainer(tmp_path, hf):
    rows = hf.examples("llama")
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    stock = hf.update_of(
        transformers.Trainer, hf.build("llama"), rows, hf.arguments(tmp_path, **args)
    )
    ours = hf.update_of(Trainer, hf.build("llama"), rows, hf.arguments(tmp_path, **args), loss="ce")
    assert hf.relative_error(ours, stock) < 1e-6


def test_the_router_loss_of_a_mixture_of_experts_is_kept(tmp_path, hf):
    """The stock Trainer drops it with any compute_loss_func: the model adds it to its own loss."""
    rows, args = hf.examples("mixtral"), hf.arguments(tmp_path)
    stock = hf.update_of(transformers.Trainer, hf.build("mixtral"), rows, args)
    ours = hf.update_of(Trainer, hf.build("mixtral"), rows, args, loss="ce")
    model = hf.build("mixtral")
    model.config.router_aux_loss_coef = 0.0
    without = hf.update_of(Trainer, model, rows, args, loss="ce")
    assert hf.relative_error(ours, stock) < 1e-6
    assert hf.relative_error(without, stock) > 1e-3


def test_an_update_has_the_mean_of_the_router_losses_of_its_batches(tmp_path, hf):
    rows = hf.examples("mixtral")
    args = hf.arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    got = hf.update_of(Trainer, hf.build("mixtral"), rows, args, loss="rlo:k=5")
    model = hf.build("mixtral").train()
    objective, routers = [], []
    for part in (rows[:4], rows[4:]):
        batch = hf.collate(part)
        outputs = model(**batch)
        logits, labels = outputs.logits[:, :-1], batch["labels"][:, 1:]
        kept = labels != -100
        log_p = logits[kept].log_softmax(-1).gather(-1, labels[kept][:, None])
        objective.append((5 * (1 - (log_p / 5).exp())).sum())
        routers.append(model.config.router_aux_loss_coef * outputs.aux_loss)
    count = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    (sum(objective) / count + sum(routers) / 2).backward()
    assert hf.relative_error(got, hf.gradients(model)) < 3e-6


@pytest.mark.parametrize("name", ["llama", "t5", "bert_sequence"])
@pytest.mark.parametrize("linear", ["off", "auto"])
def test_label_smoothing_is_the_expectation_over_the_smoothed_label(tmp_path, hf, name, linear):
    rows = hf.examples(name)
    args = hf.arguments(tmp_path, label_smoothing_factor=0.2)
    got = hf.update_of(Trainer, hf.build(name), rows, args, loss="rlo:k=5", linear=linear)
    model = hf.build(name).train()
    logits, labels = hf.scores_and_labels(model, name, hf.collate(rows))
    kept = labels != -100
    p = logits[kept].softmax(-1)
    losses = 5 * (1 - p ** (1 / 5))
    y = labels[kept].unsqueeze(-1)
    (0.8 * losses.gather(-1, y).squeeze(-1) + 0.2 * losses.mean(-1)).mean().backward()
    assert hf.relative_error(got, hf.gradients(model)) < 2e-6


def doubled(logits, target):
    """A foreign loss: a mean, without options."""
    return 2.0 * F.cross_entropy(logits, target)


@pytest.mark.parametrize(
    ("loss", "like", "factor"),
    [
        (rlo, "rlo", 1.0),
        (rlo(k=5), "rlo:k=5", 1.0),
        (RootedLoss, "rlo", 1.0),
        (rooted_loss, "rlo", 1.0),
        (torch.nn.CrossEntropyLoss(), "ce", 1.0),
        (torch.nn.CrossEntropyLoss, "ce", 1.0),
        (doubled, "ce", 2.0),
        (lambda logits, target: 2 * F.cross_entropy(logits, target, reduction="none"), "ce", 2.0),
    ],
)
def test_a_class_a_module_and_a_callable_are_losses_too(tmp_path, hf, loss, like, factor):
    rows = hf.examples("llama")
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    got = hf.update_of(Trainer, hf.build("llama"), rows, hf.arguments(tmp_path, **args), loss=loss)
    expected = hf.update_of(
        Trainer, hf.build("llama"), rows, hf.arguments(tmp_path, **args), loss=like, linear="off"
    )
    assert hf.relative_error(got, factor * expected) < 2e-6


@pytest.mark.parametrize("steps", [1, 4])
def test_class_weights_divide_by_their_sum_over_the_whole_update(tmp_path, hf, steps):
    weight = torch.tensor([1.0, 5.0, 0.2, 2.0, 1.0])
    rows = hf.examples("bert_token")
    args = hf.arguments(
        tmp_path, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps
    )
    loss = RootedLoss(k=5, weight=weight)
    got = hf.update_of(Trainer, hf.build("bert_token"), rows, args, loss=loss)
    model = hf.build("bert_token").train()
    logits, labels = hf.scores_and_labels(model, "bert_token", hf.collate(rows))
    rooted_loss(logits.flatten(0, 1), labels.flatten(), k=5, weight=weight).backward()
    assert hf.relative_error(got, hf.gradients(model)) < 2e-6


@pytest.mark.parametrize("everywhere", [True, False])
def test_class_weights_are_counted_over_all_processes_where_the_trainer_averages_over_them(
    tmp_path, hf, monkeypatch, everywhere
):
    """A second process whose labels weigh three times as much; the real thing is in the slow
    tests."""
    weight = torch.tensor([1.0, 5.0, 0.2, 2.0, 1.0])
    args = hf.arguments(tmp_path, average_tokens_across_devices=everywhere)
    trainer = Trainer(hf.build("bert_token"), args, loss=RootedLoss(k=5, weight=weight))
    monkeypatch.setattr(type(args), "world_size", 2)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.stack([own, 3 * own]))
    batches = [hf.collate(hf.examples("bert_token", 3, seed=seed)) for seed in (0, 1)]
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    own = float(weight[labels[labels != -100]].sum())
    counted = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert float(counted) == pytest.approx(4 * own if everywhere else own)


def test_the_ignore_index_of_a_criterion_is_honoured(tmp_path, hf):
    rows = hf.examples("bert_token")
    args = hf.arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    got = hf.update_of(
        Trainer, hf.build("bert_token"), rows, args, loss=RootedLoss(k=5, ignore_index=2)
    )
    for row in rows:
        row["labels"] = row["labels"].masked_fill(row["labels"] == 2, -100)
    assert hf.relative_error(got, hf.expected_gradient("bert_token", rows, 5.0)) < 2e-6


def test_labels_under_another_name_are_found(tmp_path, hf):
    rows = hf.examples("llama")
    expected = hf.expected_gradient("llama", rows, 3.0)

    def collate(batch):
        inputs = hf.collate(batch)
        inputs["answers"] = inputs.pop("labels")
        return inputs

    grab = hf.GrabGradients()
    trainer = Trainer(
        hf.build("llama"),
        hf.arguments(tmp_path, label_names=["answers"]),
        collate,
        rows,
        callbacks=[grab],
    )
    trainer.train()
    assert hf.relative_error(grab.value, expected) < 2e-6


def test_labels_that_are_shifted_already_are_not_shifted_again(tmp_path, hf):
    rows = hf.examples("llama")

    def collate(batch):
        inputs = hf.collate(batch)
        inputs["shift_labels"] = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        return inputs

    grab = hf.GrabGradients()
    args = hf.arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    Trainer(hf.build("llama"), args, collate, rows, loss="rlo:k=5", callbacks=[grab]).train()
    assert hf.relative_error(grab.value, hf.expected_gradient("llama", rows, 5.0)) < 2e-6


@pytest.mark.parametrize("linear", ["off", "fused"])
def test_packed_rows_have_the_gradient_of_padded_ones(tmp_path, hf, linear):
    rows = hf.examples("llama")
    packer = transformers.DataCollatorWithFlattening()
    lists = [{key: value.tolist() for key, value in row.items()} for row in rows]
    grab = hf.GrabGradients()
    args = hf.arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    Trainer(
        hf.build("llama"), args, packer, lists, loss="rlo:k=5", callbacks=[grab], linear=linear
    ).train()
    assert hf.relative_error(grab.value, hf.expected_gradient("llama", rows, 5.0)) < 2e-6


@pytest.mark.parametrize("name", ["llama", "t5", "bert_token", "bert_multi_label", "vit"])
def test_evaluation_is_exact_whatever_the_batch_size(tmp_path, hf, name):
    rows, model = hf.examples(name, 7), hf.build(name).eval()
    logits, labels = hf.scores_and_labels(model, name, hf.collate(rows))
    objective = hf.rooted_mean([(logits, labels)], 5.0).item()
    if labels.is_floating_point():
        ce = F.binary_cross_entropy_with_logits(logits, labels).item()
    else:
        ce = F.cross_entropy(logits.flatten(0, -2), labels.flatten()).item()
    for batch in (1, 3, 7):
        trainer = Trainer(
            model,
            hf.arguments(tmp_path, per_device_eval_batch_size=batch),
            hf.collate,
            eval_dataset=rows,
            loss="rlo:k=5",
        )
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(objective, rel=1e-5)
        assert metrics["eval_ce"] == pytest.approx(ce, rel=1e-5)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(ce), rel=1e-5)


def test_evaluation_can_report_cross_entropy_as_its_loss(tmp_path, hf):
    trainer = Trainer(
        hf.build("llama"),
        hf.arguments(tmp_path),
        hf.collate,
        eval_dataset=hf.examples("llama"),
        eval_loss="ce",
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_ce"] != metrics["eval_objective"]


def test_predict_returns_logits_labels_and_the_same_metrics(tmp_path, hf):
    rows = hf.examples("bert_sequence")
    trainer = Trainer(hf.build("bert_sequence"), hf.arguments(tmp_path), hf.collate)
    output = trainer.predict(rows)
    assert output.predictions.shape == (8, 5)
    assert output.label_ids.tolist() == [row["labels"] for row in rows]
    assert output.metrics["test_perplexity"] == pytest.approx(math.exp(output.metrics["test_ce"]))


@pytest.mark.parametrize("name", ["llama", "bert_sequence"])
def test_a_prediction_step_returns_the_objective_logits_and_labels(tmp_path, hf, name):
    model, batch = hf.build(name).eval(), hf.collate(hf.examples(name))
    trainer = Trainer(model, hf.arguments(tmp_path), hf.collate, loss="rlo:k=5")
    expected = hf.rooted_mean([hf.scores_and_labels(model, name, batch)], 5.0).item()
    loss, logits, labels = trainer.prediction_step(model, batch, prediction_loss_only=False)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(logits, model(**batch).logits)
    assert torch.equal(labels, batch["labels"])
    loss, *rest = trainer.prediction_step(model, batch, prediction_loss_only=True)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert rest == [None, None]


def test_tuple_outputs_evaluate_to_the_same_logits(tmp_path, hf):
    model, rows = hf.build("bert_sequence"), hf.examples("bert_sequence")
    expected = Trainer(model, hf.arguments(tmp_path), hf.collate).predict(rows).predictions
    model.config.return_dict = False
    got = Trainer(model, hf.arguments(tmp_path), hf.collate).predict(rows).predictions
    assert (got == expected).all()


def test_compute_loss_returns_outputs_with_logits_in_training(tmp_path, hf):
    model = hf.build("llama").train()
    trainer = Trainer(model, hf.arguments(tmp_path), hf.collate)
    batch = hf.collate(hf.examples("llama"))
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs.logits.shape[-1] == hf.V
    assert loss.item() == pytest.approx(trainer.compute_loss(model, batch).item(), rel=1e-6)
    assert "labels" in batch


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_in_evaluation_reports_objective_and_perplexity(tmp_path, hf, name):
    rows, model = hf.examples(name, 5), hf.build(name)
    args = transformers.Seq2SeqTrainingArguments(
        **{
            **hf.arguments(tmp_path, per_device_eval_batch_size=2).to_dict(),
            "predict_with_generate": True,
            "generation_max_length": 6,
        }
    )
    trainer = Seq2SeqTrainer(
        model,
        args,
        hf.collate,
        eval_dataset=rows,
        loss="rlo:k=5",
        compute_metrics=lambda prediction: {"length": prediction.predictions.shape[1]},
    )
    metrics = trainer.evaluate()
    pairs = [hf.scores_and_labels(model.eval(), name, hf.collate(rows))]
    assert metrics["eval_length"] >= 1
    assert metrics["eval_loss"] == pytest.approx(hf.rooted_mean(pairs, 5.0).item(), rel=1e-5)


def test_a_schedule_moves_with_the_run(tmp_path, hf):
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer.loss_objective.link.k)

    trainer = Trainer(
        hf.build("bert_sequence"),
        hf.arguments(tmp_path, max_steps=4),
        hf.collate,
        hf.examples("bert_sequence"),
        loss="rlo:k=2,warmup=0.5",
        callbacks=[Watch()],
    )
    trainer.train()
    assert seen == [math.inf, 4.0, 2.0, 2.0]


def test_a_batch_without_labels_to_train_on_is_a_zero(tmp_path, hf):
    rows = hf.examples("llama", 2)
    for row in rows:
        row["labels"].fill_(-100)
    for linear in ("off", "fused"):
        got = hf.update_of(Trainer, hf.build("llama"), rows, hf.arguments(tmp_path), linear=linear)
        assert got.abs().max() == 0


@pytest.mark.parametrize("linear", ["off", "fused"])
def test_bfloat16_and_checkpointing_keep_the_gradient(tmp_path, hf, linear):
    rows = hf.examples("llama")
    expected = hf.expected_gradient("llama", rows, 5.0)
    plain = hf.arguments(
        tmp_path,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )
    model = hf.build("llama")
    got = hf.update_of(Trainer, model, rows, plain, loss="rlo:k=5", linear=linear)
    assert hf.relative_error(got, expected) < 2e-6
    half = hf.arguments(tmp_path, bf16=True)
    got = hf.update_of(Trainer, hf.build("llama"), rows, half, loss="rlo:k=5", linear=linear)
    assert hf.relative_error(got, expected) < 0.04  # bfloat16 has 3 digits


@pytest.mark.parametrize("linear", ["off", "fused"])
def test_float16_with_a_scaled_loss_keeps_the_gradient(tmp_path, hf, linear):
    """What fp16=True does on a GPU, by hand: autocast, and the loss times GradScaler's 65,536."""
    model, rows = hf.build("llama").train(), hf.examples("llama")
    trainer = Trainer(model, hf.arguments(tmp_path), hf.collate, loss="rlo:k=5", linear=linear)
    scale = 2.0**16
    with torch.autocast("cpu", torch.float16):
        loss = trainer.compute_loss(model, hf.collate(rows))
    assert loss.dtype == torch.float32
    (loss * scale).backward()
    assert trainer.linear_path.startswith("fused" if linear == "fused" else "logits")
    got = hf.gradients(model) / scale
    assert got.isfinite().all()
    assert hf.relative_error(got, hf.expected_gradient("llama", rows, 5.0)) < 0.005


def test_the_path_that_runs_is_said_once(tmp_path, hf, caplog):
    rows = hf.examples("llama")
    with caplog.at_level(logging.WARNING, logger="rlo_hf.linear_path"):
        hf.update_of(Trainer, hf.build("llama"), rows, hf.arguments(tmp_path, max_steps=2))
        hf.update_of(Trainer, hf.build("llama"), rows, hf.arguments(tmp_path), linear="off")
    assert [record.getMessage() for record in caplog.records] == [
        "loss rlo, linear path: fused",
        "loss rlo, linear path: logits (linear='off')",
    ]


def test_what_the_fused_path_cannot_do_is_refused_with_the_reason(tmp_path, hf):
    class OddForCausalLM(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits**3
            return output

    rows = hf.examples("llama")
    odd = OddForCausalLM(hf.build("llama").config)
    with pytest.raises(
        RLOError, match=r"^linear='fused' is not possible for OddForCausalLM: its logits"
    ):
        hf.update_of(Trainer, odd, rows, hf.arguments(tmp_path), linear="fused")
    with pytest.raises(RLOError, match="the loss has no link$"):
        hf.update_of(
            Trainer, hf.build("llama"), rows, hf.arguments(tmp_path), linear="fused", loss=doubled
        )
    with pytest.raises(RLOError, match=r"BertForMaskedLM: the task is token, not causal$"):
        hf.update_of(
            Trainer,
            hf.build("bert_mlm"),
            hf.examples("bert_mlm"),
            hf.arguments(tmp_path),
            linear="fused",
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: transformers.BertForQuestionAnswering,
            r"^BertForQuestionAnswering has two targets per example .* question answering$",
        ),
        (lambda: transformers.BertModel, r"^the task of BertModel is not known; give task= one of"),
    ],
)
def test_models_without_a_rooted_loss_are_refused(tmp_path, hf, make, message):
    model = make()(hf.build("bert_mlm").config)
    with pytest.raises(RLOError, match=message):
        Trainer(model, hf.arguments(tmp_path), hf.collate)


def test_regression_is_refused(tmp_path, hf):
    config = hf.build("bert_sequence").config
    config.num_labels = 1
    model = transformers.BertForSequenceClassification(config)
    with pytest.raises(RLOError, match=r"regression \(num_labels=1, problem_type=None\); a rooted"):
        Trainer(model, hf.arguments(tmp_path), hf.collate)


def test_wrong_arguments_are_refused(tmp_path, hf):
    model, args = hf.build("llama"), hf.arguments(tmp_path)
    with pytest.raises(SpecError, match=r"^unknown loss 'rol'; did you mean 'rlo'\?"):
        Trainer(model, args, loss="rol")
    with pytest.raises(TypeError, match=r"^loss must be a spec, a criterion, its class or a call"):
        Trainer(model, args, loss=3)
    with pytest.raises(ValueError, match=r"^linear must be 'auto', 'fused' or 'off', got 'on'$"):
        Trainer(model, args, linear="on")
    with pytest.raises(RLOError, match=r"^compute_loss_func and loss are the same slot"):
        Trainer(model, args, compute_loss_func=doubled)
    several = hf.arguments(tmp_path, label_names=["labels", "more"])
    with pytest.raises(RLOError, match=r"^label_names must be one name, got \['labels', 'more'\]$"):
        Trainer(model, several)
    smoothed = hf.arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(SpecError, match=r"^label smoothing is given twice, as 0.3 in the loss"):
        Trainer(model, smoothed, loss=RootedLoss(label_smoothing=0.3))
    with pytest.raises(SpecError, match=r"^loss 'doubled' has no link, so it cannot honour lab"):
        Trainer(model, smoothed, loss=doubled)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_takes_the_fused_path_and_is_compiled_once(tmp_path, hf):
    """The output layer is the one break in the graph; three updates on shapes of one size."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows = [row for row in hf.examples("llama", 24) if len(row["input_ids"]) == 9]
    args = hf.arguments(
        tmp_path,
        torch_compile=True,
        torch_compile_backend="aot_eager",
        max_steps=3,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
    )
    grab = hf.GrabGradients()
    trainer = Trainer(hf.build("llama"), args, hf.collate, rows, loss="rlo:k=5", callbacks=[grab])
    trainer.train()
    assert trainer.linear_path == "fused"
    expected = hf.expected_gradient("llama", rows[:2], 5.0)
    assert hf.relative_error(grab.value, expected) < 3e-6
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_whisper_has_the_gradient_of_the_formula(tmp_path, hf):
    """Its decoder inputs are the labels moved right, ignored ones as padding."""
    config = transformers.WhisperConfig(
        vocab_size=37,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=8,
        max_target_positions=16,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, 37, (4, 6), generator=g)
    labels[0, 4:] = labels[2, 2:] = -100
    batch = {"input_features": torch.randn(4, 8, 16, generator=g), "labels": labels}

    def model():
        torch.manual_seed(0)
        return transformers.WhisperForConditionalGeneration(config)

    grab = hf.GrabGradients()
    rows = [{name: batch[name][i] for name in batch} for i in range(4)]
    Seq2SeqTrainer(
        model(),
        transformers.Seq2SeqTrainingArguments(**_common(hf, tmp_path)),
        lambda rows: {name: torch.stack([row[name] for row in rows]) for name in batch},
        rows,
        loss="rlo:k=5",
        callbacks=[grab],
    ).train()
    one = model().train()
    logits = one(**batch).logits  # it makes its decoder inputs of the labels itself
    hf.rooted_mean([(logits, labels)], 5.0).backward()
    assert hf.relative_error(grab.value, hf.gradients(one)) < 3e-6


def _common(hf, tmp_path):
    names = ("output_dir", "use_cpu", "max_steps", "report_to", "save_strategy", "disable_tqdm",
             "max_grad_norm", "learning_rate", "optim", "remove_unused_columns",
             "train_sampling_strategy", "dataloader_pin_memory")  # fmt: skip
    given = hf.arguments(tmp_path).to_dict()
    return {name: given[name] for name in names} | {"per_device_train_batch_size": 4}


def test_ctc_is_refused_with_the_reason(tmp_path, hf):
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,),
        conv_stride=(2,),
        conv_kernel=(3,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    with pytest.raises(
        RLOError, match=r"^Wav2Vec2ForCTC is trained on CTC, a sum over all alignmen"
    ):
        Trainer(transformers.Wav2Vec2ForCTC(config), hf.arguments(tmp_path), loss="rlo")


def test_the_k_of_a_schedule_is_logged_beside_the_loss(tmp_path, hf):
    args = hf.arguments(tmp_path, max_steps=4, logging_steps=1, learning_rate=1e-3)
    rows = hf.examples("llama")
    loss = "rlo:k=2,warmup=0.5,k_start=8"
    trainer = Trainer(hf.build("llama"), args, hf.collate, rows, loss=loss)
    trainer.train()
    logged = [record["k"] for record in trainer.state.log_history if "loss" in record]
    assert logged == pytest.approx([8.0, 1 / ((1 / 8 + 1 / 2) / 2), 2.0, 2.0])
    other = Trainer(hf.build("llama"), args, hf.collate, rows, loss="rlo:k=2")
    other.train()
    assert all("k" not in record for record in other.state.log_history)
