"""A model in a GGUF file, written here with the format's own library."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from rlo_core.errors import RLOError
from rlo_gptq.models import source as source_module
from rlo_gptq.models.source import ModelSource, find_model
from rlo_gptq.settings import LayerSettings
from torch import Tensor

gguf = pytest.importorskip("gguf")

HEADS = 4
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(weight: Tensor) -> Tensor:
    """The format keeps the two halves of each head's rotary pairs side by side."""
    return weight.view(HEADS, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(model_folder: Path, path: Path) -> dict[str, Tensor]:
    """Write a Llama in float32; return the tensors of the original."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    # The tokenizer needs a merge at least; what is padding elsewhere is its result here.
    writer.add_token_list([token.replace("<pad>", "ab") for token, _ in vocabulary])
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        owner = name.removesuffix(".weight")
        if owner in OUTSIDE:
            writer.add_tensor(f"{OUTSIDE[owner]}.weight", tensor.numpy())
            continue
        number, _, inside = owner.removeprefix("model.layers.").partition(".")
        stored = interleaved(tensor) if inside[-6:] in ("q_proj", "k_proj") else tensor
        writer.add_tensor(f"blk.{number}.{NAMES[inside]}.weight", stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def test_a_gguf_file_becomes_the_same_model_once_and_is_quantized(
    model_folder, text_file, quantize_to, tmp_path
):
    state = write_gguf(model_folder("llama"), tmp_path / "tiny.gguf")
    folder = find_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")
    assert find_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache") == folder
    found = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name
    layer = LayerSettings(bits=4, method="nearest")
    assert len(quantize_to(folder, text_file, tmp_path / "q", layer).records) == 14


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return a file with some of its bytes, most of them in the header, made others."""
    kind = draw.randrange(4)
    if kind == 0:
        return data[: draw.randrange(len(data))]
    changed = bytearray(data)
    limit = len(data) if kind == 1 else min(len(data), 4096)
    for _ in range(draw.choice([1, 1, 4, 32])):
        at = draw.randrange(limit)
        changed[at] ^= 1 << draw.randrange(8)
    if kind == 3:  # a length or a number of an absurd size
        at = draw.randrange(0, limit - 8)
        changed[at : at + 8] = draw.choice([2**63, 2**40, 2**31, 0]).to_bytes(8, "little")
    return bytes(changed)


class TooSlowError(BaseException):
    """The alarm rang."""


@pytest.mark.parametrize(
    ("first", "count"), [(0, 24), pytest.param(1000, 320, marks=pytest.mark.slow)]
)
def test_a_damaged_gguf_file_is_refused_in_one_line_or_read(first, count, model_folder, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(model_folder("llama"), file)
    good = file.read_bytes()

    def ring(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, ring)
    outcomes: list[str] = []
    try:
        for seed in range(first, first + count):
            file.write_bytes(damaged(good, random.Random(seed)))
            signal.alarm(30)
            try:
                ModelSource(find_model(str(file), cache=tmp_path / "cache")).close()
                outcomes.append("read")
            except RLOError as error:
                outcomes.append(str(error))
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(outcomes) == count
    refusals = [message for message in outcomes if message != "read"]
    assert len(refusals) > count / 10
    assert not [message for message in refusals if "\n" in message or len(message) > 800]
    assert not list((tmp_path / "cache").glob(".*"))  # nothing half written


def test_two_processes_that_convert_one_file_get_one_folder(model_folder, tmp_path, monkeypatch):
    write_gguf(model_folder("llama"), tmp_path / "tiny.gguf")
    first = find_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "other")
    write = source_module.write_stored_types

    def meanwhile(folder, types):  # the other process is done first
        write(folder, types)
        shutil.copytree(first, folder.with_name(first.name))

    monkeypatch.setattr(source_module, "write_stored_types", meanwhile)
    folder = find_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    assert (folder / "model.safetensors").is_file()
