"""`compute_loss_func=loss_func(...)`: the slot of transformers' own Trainer."""

import pytest
import torch
import transformers
from rlo_core import RootedLoss
from rlo_core.errors import RLOError
from rlo_hf import loss_func


@pytest.mark.parametrize(("batch", "steps"), [(8, 1), (2, 4)])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "opt", "bert_mlm", "bert_token", "bert_sequence", "vit"]
)
def test_an_update_has_the_exact_gradient(tmp_path, hf, name, batch, steps):
    rows, model = hf.examples(name), hf.build(name)
    args = hf.arguments(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps
    )
    compute = loss_func("rlo:k=5", model=model)
    got = hf.update_of(transformers.Trainer, model, rows, args, compute_loss_func=compute)
    assert hf.relative_error(got, hf.expected_gradient(name, rows, 5.0)) < 2e-6


@pytest.mark.parametrize("name", ["llama", "bert_multi_label", "bert_token"])
def test_the_task_is_told_from_the_outputs(tmp_path, hf, name):
    rows = hf.examples(name)
    args = hf.arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    got = hf.update_of(
        transformers.Trainer, hf.build(name), rows, args, compute_loss_func=loss_func("rlo:k=5")
    )
    assert hf.relative_error(got, hf.expected_gradient(name, rows, 5.0)) < 2e-6


def test_a_count_taken_before_the_shift_is_set_right_where_it_can_be_known(tmp_path, hf):
    rows, compute = hf.examples("gpt2"), loss_func("rlo:k=5")
    args = hf.arguments(tmp_path)
    got = hf.update_of(
        transformers.Trainer, hf.build("gpt2"), rows, args, compute_loss_func=compute
    )
    assert hf.relative_error(got, hf.expected_gradient("gpt2", rows, 5.0)) < 2e-6
    args = hf.arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(RLOError, match=r"counted before they are shifted.*loss_func\(loss, model="):
        hf.update_of(transformers.Trainer, hf.build("gpt2"), rows, args, compute_loss_func=compute)


def test_encoder_decoder_models_are_refused(tmp_path, hf):
    """BART would train on wrong decoder inputs without a word."""
    with pytest.raises(RLOError, match=r"use rlo_hf\.Seq2SeqTrainer"):
        hf.update_of(
            transformers.Trainer,
            hf.build("bart"),
            hf.examples("bart"),
            hf.arguments(tmp_path),
            compute_loss_func=loss_func("rlo"),
        )


def test_what_it_cannot_be_exact_about_is_refused():
    with pytest.raises(RLOError, match=r"^a loss with class weights needs"):
        loss_func(RootedLoss(weight=torch.ones(3)))
    with pytest.raises(RLOError, match=r"^the batch has no 'labels'$"):
        loss_func("rlo")({"logits": torch.zeros(1, 2)}, None)
    with pytest.raises(RLOError, match=r"cannot be told from outputs of type dict"):
        loss_func("rlo")({"logits": torch.zeros(1, 2)}, torch.tensor([0]))
