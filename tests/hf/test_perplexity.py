"""True perplexity, against a float64 computation and the published figure of a real model."""

import math
import re

import pytest
import torch
from rlo_core.lm.perplexity import perplexity, token_ce
from rlo_core.lm.text import load_text
from torch import nn


class Bigram(nn.Module):
    """Logits depend on the last token only, so that the oracle is a table look-up."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids):
        self.seen.append(tuple(input_ids.shape))
        return self.table(input_ids)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("context", [2, 7, 100, 1000])
def test_it_is_the_mean_over_windows_that_do_not_overlap(context, batch_size):
    model, ids = Bigram(11), torch.randint(11, (205,))
    result = perplexity(model, ids, context=context, batch_size=batch_size)
    log_p = model.table.weight.double().log_softmax(-1)
    width = min(context, len(ids))
    terms = [
        -log_p[ids[i - 1], ids[i]]
        for start in range(0, len(ids) - width + 1, width)
        for i in range(start + 1, start + width)
    ]
    expected = torch.stack(terms).mean().item()
    assert result.tokens == len(terms)
    assert result.ce == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == math.exp(result.ce)
    assert all(shape[0] <= batch_size for shape in model.seen)


def test_ignored_targets_do_not_count():
    logits, target = torch.randn(2, 600, 5), torch.randint(5, (2, 600))
    target[0, :590] = -100
    total, count = token_ce(logits, target)
    log_p = logits.double().log_softmax(-1)
    kept = target != -100
    expected = -log_p[kept].gather(-1, target[kept].unsqueeze(-1)).sum().item()
    assert count == 610
    assert total == pytest.approx(expected, rel=1e-6)


def test_half_precision_logits_are_computed_in_float32():
    logits, target = torch.randn(1000, 50).mul(5).bfloat16(), torch.randint(50, (1000,))
    total, count = token_ce(logits, target)
    expected = -logits.double().log_softmax(-1).gather(-1, target.unsqueeze(-1)).sum().item()
    assert total / count == pytest.approx(expected / 1000, rel=1e-6)


def test_the_model_is_given_back_as_it_was():
    model = nn.ModuleDict({"a": Bigram(3), "b": nn.Dropout()}).train()
    model["b"].eval()
    model.forward = model["a"].forward
    perplexity(model, torch.tensor([0, 1, 2]), context=3)
    assert model.training
    assert not model["b"].training


def test_a_broken_model_has_infinite_perplexity():
    model = Bigram(2)
    with torch.no_grad():
        model.table.weight.copy_(torch.tensor([[0.0, 1e4], [1e4, 0.0]]))
    assert perplexity(model, torch.tensor([0, 0, 0]), context=3).perplexity == math.inf


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4), {"context": 2}, "input_ids must be 1-D, got shape (1, 4)"),
        ((4,), {"context": 1}, "context must be at least 2, got 1"),
        ((4,), {"context": 2, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ((4,), {"context": 2, "max_tokens": 1}, "input_ids must have at least 2 tokens, got 1"),
    ],
)
def test_wrong_arguments_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        perplexity(Bigram(2), torch.zeros(shape, dtype=torch.long), **options)


@pytest.mark.slow
def test_a_pretrained_model_has_its_published_perplexity(shared_data):
    """The data's README gives 4.743 over 600 stories, its last short window included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stories = load_text(str(shared_data / "tinystories-sample"), "test").documents[:600]
    ids = torch.tensor([i for story in stories for i in tokenizer(story).input_ids])
    assert len(ids) - math.ceil(len(ids) / 512) == 239_720  # predictions
    steps = []
    result = perplexity(
        model,
        ids,
        context=512,
        batch_size=8,
        progress=lambda *d: steps.append(d),
    )
    assert result.tokens == 469 * 511
    assert result.perplexity == pytest.approx(4.743, rel=2e-4)
    assert steps[-1] == (469, 469)
