import pytest
import torch
from rlo_core.errors import SpecError
from rlo_gptq.calibration.token_weights import logits_from_hidden, sequence_weights, weighting_link
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
KINDS = {
    "llama": {**TINY, "num_key_value_heads": 2, "intermediate_size": 48},
    "opt": {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt_neox": {**TINY, "intermediate_size": 48},
}


def model_and_hidden(kind: str):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind])).eval()
    layers = model.get_decoder().layers
    seen = []
    hook = layers[-1].register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    sequence = torch.randint(0, 61, (12,))
    with torch.no_grad():
        logits = model(sequence[None]).logits
    hook.remove()
    return model, layers, seen[0], sequence, logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_tail_gives_the_models_own_logits(kind) -> None:
    model, layers, hidden, _, logits = model_and_hidden(kind)
    with logits_from_hidden(model, layers) as logits_of:
        assert torch.allclose(logits_of(hidden), logits, atol=1e-6)
    assert torch.equal(model(torch.tensor([[1]])).logits, model(torch.tensor([[1]])).logits)


def test_a_token_weighs_the_slope_at_its_own_cross_entropy() -> None:
    model, layers, hidden, sequence, logits = model_and_hidden("llama")
    with logits_from_hidden(model, layers) as logits_of:
        weights = sequence_weights(
            logits_of, hidden, sequence, weighting_link("rlo:k=5"), energy=False
        )
    log_p = logits[0].double().log_softmax(-1)
    ce = torch.tensor([-float(log_p[t, sequence[t + 1]]) for t in range(11)])
    assert torch.allclose(weights[:-1], torch.exp(-ce / 5), atol=1e-6)
    assert weights[-1] == pytest.approx(float(weights[:-1].mean()))


def test_the_energy_is_the_squared_gradient_of_one_tokens_loss() -> None:
    model, layers, hidden, sequence, _ = model_and_hidden("llama")
    link = weighting_link("rlo-convex:k=3")
    with logits_from_hidden(model, layers) as logits_of:
        weights = sequence_weights(logits_of, hidden, sequence, link, energy=True)
        leaf = hidden.clone().requires_grad_(True)
        logits = logits_of(leaf)[0, 4]
        ce = torch.nn.functional.cross_entropy(logits[None], sequence[5:6])
        (gradient,) = torch.autograd.grad(3 * (torch.exp(ce / 3) - 1), leaf)
    assert float(weights[4]) == pytest.approx(float(gradient.square().sum()), rel=1e-4)


def test_cross_entropy_weighs_every_token_alike() -> None:
    model, layers, hidden, sequence, _ = model_and_hidden("llama")
    with logits_from_hidden(model, layers) as logits_of:
        weights = sequence_weights(logits_of, hidden, sequence, weighting_link("ce"), energy=False)
    assert torch.equal(weights, torch.ones(12))


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(SpecError, match="unknown loss 'rol'; did you mean 'rlo'?"):
        weighting_link("rol:k=5")
