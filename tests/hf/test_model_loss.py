"""`set_loss(model, ...)`: the model's own loss slot, in a loop of one's own."""

import copy

import pytest
import torch
import transformers
from rlo_core import RootedLoss
from rlo_core.errors import RLOError
from rlo_hf import set_loss
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING

CAUSAL = ("gpt2", "opt", "llama", "qwen2", "gemma2", "cohere", "granite")


@pytest.mark.parametrize("name", CAUSAL)
def test_the_models_own_loss_becomes_the_rooted_one(hf, name):
    model, batch = hf.build(name).train(), hf.collate(hf.examples(name))
    expected = hf.rooted_mean([hf.scores_and_labels(model, name, batch)], 5.0)
    set_loss(model, "rlo:k=5")
    assert model(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_stock_trainer_then_has_the_exact_gradient_under_accumulation(tmp_path, hf, name):
    """GPT-2 too, whose labels the Trainer counts one too many per row by itself."""
    rows, model = hf.examples(name), hf.build(name)
    set_loss(model, "rlo:k=5")
    args = hf.arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    got = hf.update_of(transformers.Trainer, model, rows, args)
    assert hf.relative_error(got, hf.expected_gradient(name, rows, 5.0)) < 2e-6


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_it_reaches_the_model_inside_peft(hf):
    peft = pytest.importorskip("peft")
    model, batch = hf.build("llama"), hf.collate(hf.examples("llama"))
    expected = hf.rooted_mean([hf.scores_and_labels(model, "llama", batch)], 5.0).item()
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = set_loss(peft.get_peft_model(model, config), "rlo:k=5")
    assert wrapped(**batch).loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["t5", "bart", "bert_mlm", "bert_token", "bert_sequence"])
def test_a_model_with_its_loss_inline_is_refused_with_the_way_to_use(hf, name):
    model = hf.build(name)
    with pytest.raises(
        RLOError, match=r"computes its loss inside forward.*use rlo_hf\.Trainer\(\.\.\., loss="
    ):
        set_loss(model, "rlo")


def test_a_classifier_that_takes_its_loss_from_the_slot_is_served(hf):
    config = hf.build("llama").config
    config.num_labels = 4
    model = transformers.LlamaForSequenceClassification(config).eval()
    ids, labels = torch.randint(3, hf.V, (6, 5)), torch.tensor([0, 1, 2, 3, 1, 0])
    logits = model(ids).logits
    set_loss(model, RootedLoss(k=2))
    expected = hf.rooted_mean([(logits, labels)], 2.0).item()
    assert model(ids, labels=labels).loss.item() == pytest.approx(expected, rel=1e-6)
    several = torch.randint(2, (6, 4)).float()
    model.config.problem_type = "multi_label_classification"
    expected = hf.rooted_mean([(logits, several)], 2.0).item()
    assert model(ids, labels=several).loss.item() == pytest.approx(expected, rel=1e-6)


def test_evaluation_can_be_cross_entropy(hf):
    model, batch = hf.build("llama"), hf.collate(hf.examples("llama"))
    ce = model.eval()(**batch).loss.item()
    set_loss(model, "rlo", eval_loss="ce")
    assert model.eval()(**batch).loss.item() == pytest.approx(ce, rel=1e-6)
    assert model.train()(**batch).loss.item() != pytest.approx(ce, rel=1e-2)


def test_cross_entropy_comes_back_and_other_models_never_change(hf):
    model, other = hf.build("llama"), hf.build("llama")
    batch, table = hf.collate(hf.examples("llama")), dict(LOSS_MAPPING)
    before = other(**batch).loss.item()
    set_loss(model, "rlo")
    assert other(**batch).loss.item() == before
    set_loss(model, "ce")
    assert model(**batch).loss.item() == pytest.approx(before, rel=1e-6)
    assert table == LOSS_MAPPING


def test_nothing_of_it_is_saved_and_a_copy_has_it(hf, tmp_path):
    model, batch = hf.build("llama"), hf.collate(hf.examples("llama"))
    keys = set(model.state_dict())
    set_loss(model, RootedLoss(k=2, weight=torch.ones(hf.V)))
    assert set(model.state_dict()) == keys
    assert copy.deepcopy(model)(**batch).loss.item() == model(**batch).loss.item()
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again(**batch).loss.item() != pytest.approx(model(**batch).loss.item(), rel=1e-2)


def test_a_forward_that_replaces_the_loss_afterwards_is_refused(hf):
    """Liger's kernels replace the forward when training starts, and compute cross entropy in it."""
    model = set_loss(hf.build("llama"), "rlo")

    def forward(self, input_ids, labels=None):
        return self.model(input_ids)

    forward.__module__ = "liger_kernel.transformers.model.llama"
    model.forward = forward.__get__(model)
    with pytest.raises(RLOError, match=r"^Liger has replaced this model's forward"):
        model(torch.tensor([[3, 4]]))


def test_question_answering_is_refused(hf):
    model = transformers.BertForQuestionAnswering(hf.build("bert_mlm").config)
    with pytest.raises(RLOError, match=r"^BertForQuestionAnswering has two targets per example"):
        set_loss(model, "rlo")


def test_a_model_that_is_no_language_model_is_refused(hf):
    with pytest.raises(RLOError, match=r"^the task of Linear is not known"):
        set_loss(nn.Linear(2, 2), "rlo")
