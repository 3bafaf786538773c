import json

import pytest
import torch
from rlo_gptq.models.fold import FoldError
from rlo_gptq.models.fold_checkpoint import fold_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig


@pytest.fixture
def tiny_llama(tmp_path):
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=80,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_folded_folder_loads_as_an_ordinary_model_with_the_same_logits(tiny_llama, tmp_path):
    out = fold_checkpoint(tiny_llama, tmp_path / "folded", seed=1)
    tokens = torch.arange(20)[None]
    before = AutoModelForCausalLM.from_pretrained(tiny_llama)(tokens).logits
    after = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert not torch.equal(after, before)


def test_a_folder_that_is_done_is_taken_as_it_is_and_another_seed_writes_it_anew(
    tiny_llama, tmp_path
):
    out = fold_checkpoint(tiny_llama, tmp_path / "folded", seed=1)
    index = out / "model.safetensors.index.json"
    written = index.stat().st_mtime_ns
    fold_checkpoint(tiny_llama, out, seed=1)
    assert index.stat().st_mtime_ns == written
    fold_checkpoint(tiny_llama, out, seed=2)
    assert json.loads((out / "fold.json").read_text())["seed"] == 2
    assert index.stat().st_mtime_ns != written


def test_a_refused_kind_leaves_nothing_behind(tmp_path):
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=32, hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
        intermediate_size=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(FoldError, match="got 'gpt_neox'"):
        fold_checkpoint(tmp_path / "model", tmp_path / "out", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_stories260k_keeps_its_perplexity(shared_data, tmp_path):
    from rlo_core.lm.perplexity import perplexity
    from transformers import AutoTokenizer

    folder = shared_data / "stories260k"
    text = (shared_data / "tinystories-sample" / "stories.txt").read_text()[:20_000]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    results = []
    for path in (folder, fold_checkpoint(folder, tmp_path / "folded", seed=0)):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        results.append(perplexity(model, tokens, context=256).perplexity)
    assert results[1] == pytest.approx(results[0], rel=1e-4)
