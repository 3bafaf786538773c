import copy

import pytest
import torch
from rlo_gptq.models.fold import Fold, FoldError, check_foldable, folded_config
from rlo_gptq.rounding.residual_rotation import MeanRotation
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {"vocab_size": 96, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA = {**TINY, "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 64}
OPT = {**TINY, "ffn_dim": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 48}
KINDS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 12},
    "gemma": {**LLAMA, "head_dim": 12},
    "opt": OPT,
}


def random_model(kind: str, **options):
    config = AutoConfig.for_model(kind, **KINDS[kind], **options)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():  # gains and biases that a wrong fold would not survive
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def fold(model, seed: int = 3):
    state = model.state_dict()
    config = model.config.to_dict()
    if config.get("tie_word_embeddings"):
        state = {key: value for key, value in state.items() if key != "lm_head.weight"}
    folding = Fold(config, state, state.__getitem__, seed=seed)
    after = copy.deepcopy(model)
    after.config.tie_word_embeddings = False
    after.lm_head.weight = torch.nn.Parameter(after.lm_head.weight.clone())
    missing = after.load_state_dict({name: folding.tensor(name) for name in folding.output_names})
    assert not missing.missing_keys
    return after


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_model_computes_the_same_logits(kind: str, tied: bool) -> None:
    model = random_model(kind, tie_word_embeddings=tied)
    tokens = torch.randint(3, 96, (2, 17))
    with torch.no_grad():
        before, after = model(tokens).logits, fold(model)(tokens).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_folding_spreads_an_outlier_channel(kind: str) -> None:
    model = random_model(kind)
    name = "model.layers.0.mlp.up_proj" if kind == "llama" else "model.decoder.layers.0.fc1"
    with torch.no_grad():
        model.get_submodule(name).weight[:, 5] *= 50
    after = fold(model).get_submodule(name).weight.detach()
    before = model.get_submodule(name).weight.detach()
    peak = [float((w.abs().amax(1) / w.square().mean(1).sqrt()).mean()) for w in (before, after)]
    assert peak[1] < 0.6 * peak[0]


@pytest.mark.parametrize("n", [1, 2, 48, 63, 768])
def test_the_mean_rotation_is_orthogonal_and_keeps_the_mean(n: int) -> None:
    q = MeanRotation(n, seed=1).apply(torch.eye(n))
    assert torch.allclose(q @ q.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(q.sum(1), torch.ones(n, dtype=torch.float64), atol=1e-12)
    if n > 2:
        assert q.abs().max() < 0.9


def test_a_folded_model_has_a_head_of_its_own() -> None:
    assert folded_config({"tie_word_embeddings": True})["tie_word_embeddings"] is False


def test_an_unknown_kind_is_refused_with_the_online_form() -> None:
    with pytest.raises(
        FoldError, match="--rotate fold takes model types llama, .*, got 'gpt_neox'; use"
    ):
        check_foldable({"model_type": "gpt_neox"})


def test_an_opt_with_norms_after_the_layers_is_refused() -> None:
    with pytest.raises(FoldError, match="needs OPT's norms before the layers, not after"):
        check_foldable({"model_type": "opt", "hidden_size": 48, "do_layer_norm_before": False})
