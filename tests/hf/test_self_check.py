"""The check of the first batch, at every way in, and what else was silent."""

import pytest
import torch
import transformers
from rlo_core.errors import RLOError, SpecError
from rlo_hf import Seq2SeqTrainer, Trainer, loss_func, set_loss
from rlo_hf.self_check import SelfCheckError

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()


class Added(Trainer):
    """Ours, and a regulariser."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss + 0.1 * model.lm_head.weight.square().mean()


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (OwnLoss, r"OwnLoss.compute_loss \(.*test_self_check.py, line 14\) has a loss of its own"),
        (OwnStep, r"OwnStep.training_step \(.*test_self_check.py, line 20\) passes the loss slot"),
        (Added, r"Added.compute_loss \(.*test_self_check.py, line 29\) has a loss of its own"),
    ],
)
def test_a_subclass_with_a_loss_of_its_own_is_stopped_before_the_first_update(
    tmp_path, hf, kind, what
):
    model = hf.build("llama")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(SelfCheckError, match=rf"^the loss that is propagated is .*: {what}"):
        hf.update_of(kind, model, hf.examples("llama"), hf.arguments(tmp_path), loss="rlo:k=2")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    hf.update_of(
        kind, model, hf.examples("llama"), hf.arguments(tmp_path), loss="rlo:k=2", check=False
    )


def test_a_loss_of_ones_own_that_is_the_objective_passes(tmp_path, hf):
    """`ce` by another name is `ce`."""
    rows, args = hf.examples("llama"), hf.arguments(tmp_path)
    hf.update_of(OwnLoss, hf.build("llama"), rows, args, loss="ce")


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bert_multi_label", "mixtral"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_check_passes_where_the_loss_is_ours(tmp_path, hf, name, bf16):
    kind = Seq2SeqTrainer if name == "t5" else Trainer
    options = {"bf16": bf16, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    args = hf.arguments(tmp_path, **options) if kind is Trainer else hf.arguments_of(
        transformers.Seq2SeqTrainingArguments, {**keep(hf.arguments(tmp_path)), **options}
    )  # fmt: skip
    hf.update_of(kind, hf.build(name), hf.examples(name), args, loss="rlo:k=2")


def keep(args):
    names = ("output_dir", "use_cpu", "max_steps", "report_to", "save_strategy", "disable_tqdm",
             "remove_unused_columns", "dataloader_pin_memory")  # fmt: skip
    return {name: getattr(args, name) for name in names}


def test_a_loop_that_propagates_another_loss_of_the_model_is_stopped(hf):
    model = set_loss(hf.build("llama"), "rlo:k=2").train()
    batch = hf.collate(hf.examples("llama"))
    outputs = model(**batch)
    loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].ravel())
    with pytest.raises(
        SelfCheckError, match=r"^the gradient that reaches the logits of LlamaForCa"
    ):
        loss.backward()
    copy = set_loss(hf.build("llama"), "rlo:k=2").train()
    copy(**batch).loss.backward()


def test_a_stock_trainer_that_never_calls_the_function_is_stopped(tmp_path, hf):
    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    model = hf.build("llama")
    more = {"compute_loss_func": loss_func("rlo:k=2", model=model)}
    with pytest.raises(SelfCheckError, match=r"does not come from rlo:k=2: the training loop has"):
        hf.update_of(Own, model, hf.examples("llama"), hf.arguments(tmp_path), **more)


@pytest.mark.parametrize("metric", ["eval_ce", "perplexity", "eval_objective"])
def test_the_best_checkpoint_is_the_one_with_the_smallest_loss(tmp_path, hf, metric):
    """transformers takes every metric whose name does not end in "loss" for a score."""
    args = hf.arguments(
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        learning_rate=0.5,
    )
    rows = hf.examples("llama")
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=3)
    trainer = Trainer(
        hf.build("llama"),
        args,
        hf.collate,
        rows,
        rows,
        loss="rlo:k=5",
        callbacks=[stop],
    )
    trainer.train()
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = [record[name] for record in trainer.state.log_history if name in record]
    assert len(values) == 3
    assert len(set(values)) == 3
    assert trainer.state.best_metric == min(values)
    best = values.index(min(values)) + 1
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")


def test_early_stopping_stops_when_cross_entropy_rises(tmp_path, hf):
    args = hf.arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=1,
                        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
                        metric_for_best_model="eval_ce", learning_rate=1e-3)  # fmt: skip
    rows = hf.examples("llama")
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    trainer = Trainer(hf.build("llama"), args, hf.collate, rows, rows, loss="ce", callbacks=[stop])
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-3, maximize=True)
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_second_training_takes_the_head_of_the_new_model(tmp_path, hf):
    args, rows = hf.arguments(tmp_path, learning_rate=0.5), hf.examples("llama")
    trainer = Trainer(
        None, args, hf.collate, rows, model_init=lambda: hf.build("llama"), loss="rlo:k=5"
    )
    trainer.train()
    first = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.linear_path == "fused"
    for one, two in zip(first, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one, two)


class Bare(torch.nn.Module):
    """A model without a configuration."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 5)

    def forward(self, x, labels=None):
        return {"logits": self.linear(x)}


def test_a_model_without_a_configuration_trains_when_its_task_is_given(tmp_path, hf):
    rows = [{"x": torch.randn(3), "labels": i % 5} for i in range(8)]
    args = hf.arguments(tmp_path)
    with pytest.raises(
        RLOError, match=r"^the task of Bare is not known; give task= one of causal,"
    ):
        Trainer(Bare(), args, loss="rlo")
    collate = transformers.default_data_collator
    trainer = Trainer(Bare(), args, collate, rows, loss="rlo:k=2", task="sequence")
    weight = trainer.model.linear.weight.detach().clone()
    trainer.train()
    assert not torch.equal(weight, trainer.model.linear.weight)


@pytest.mark.parametrize("linear", ["fused", "off"])
def test_with_prompt_tuning_the_prompt_predicts_the_first_token(tmp_path, hf, linear):
    peft = pytest.importorskip("peft")
    rows, args = hf.examples("llama"), hf.arguments(tmp_path)

    def adapted():
        torch.manual_seed(3)
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        return peft.get_peft_model(hf.build("llama"), config)

    got = hf.update_of(Trainer, adapted(), rows, args, loss="ce", linear=linear)
    model, batch = adapted(), hf.collate(rows)
    outputs = model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
    logits = outputs.logits[:, 2:-1]
    labels = batch["labels"]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert hf.relative_error(got, hf.gradients(model)) < 3e-6
    stock = adapted()
    stock(**batch).loss.backward()
    assert hf.relative_error(got, hf.gradients(stock)) < 3e-6


@pytest.mark.parametrize(
    "loss", [torch.nn.MSELoss(), torch.nn.NLLLoss, torch.nn.functional.l1_loss]
)
def test_torchs_losses_that_take_no_labels_are_refused_when_the_trainer_is_made(tmp_path, hf, loss):
    with pytest.raises(
        SpecError, match=r"^loss must take logits \(N, C\) and class labels \(N\), an"
    ):
        Trainer(hf.build("llama"), hf.arguments(tmp_path), loss=loss)
