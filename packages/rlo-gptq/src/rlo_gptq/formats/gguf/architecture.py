"""From a transformers model to llama.cpp's names: architecture, tensors and hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlo_gptq.formats.gguf.types import GGUFError

_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a kind of model, and how its tensors differ from transformers'.

    Args:
        name: Of the architecture, `general.architecture`.
        block: Names inside a block, transformers' and llama.cpp's.
        permuted: Whether the rows of q and k are stored as interleaved rotary pairs.
        gain_offset: Added to every stored norm gain (Gemma's norms multiply by 1 + gain).
        activations: Of the MLP that the architecture has built in.
        own_head: Whether it reads a head that is not the embedding.
    """

    name: str
    block: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    permuted: bool = False
    gain_offset: float = 0.0
    activations: tuple[str, ...] = ("silu", "swish")
    own_head: bool = True


_GELU = ("gelu_pytorch_tanh", "gelu")
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", block={**_BLOCK, **_QK_NORMS}),
    "gemma": Architecture("gemma", gain_offset=1.0, activations=_GELU, own_head=False),
    "gemma2": Architecture(
        "gemma2",
        block={**_BLOCK, **_GEMMA_NORMS},
        gain_offset=1.0,
        activations=_GELU,
        own_head=False,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        block={**_BLOCK, **_QK_NORMS, **_GEMMA_NORMS},
        gain_offset=1.0,
        activations=_GELU,
        own_head=False,
    ),
}
"""By `config.model_type`."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a model's `config.json`.

    Raises:
        GGUFError: llama.cpp has none for it, or the model has a part that the architecture lacks.
    """
    kind = str(config.get("model_type"))
    if kind == "opt":
        raise GGUFError(
            "llama.cpp has no architecture for OPT (learned positions with an offset of 2), so no "
            "GGUF file can hold it; use --format gptq or compressed-tensors"
        )
    if kind not in ARCHITECTURES:
        raise GGUFError(
            f"--format gguf takes model types {', '.join(ARCHITECTURES)}, got {kind!r}; "
            "use --format gptq or compressed-tensors"
        )
    found = ARCHITECTURES[kind]
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation is not None and activation not in found.activations:
        raise GGUFError(
            f"llama.cpp's {found.name} has the activation {found.activations[0]!r}, "
            f"got {activation!r}"
        )
    if not found.own_head and not config.get("tie_word_embeddings", True):
        raise GGUFError(
            f"llama.cpp's {found.name} takes the embedding as its head, and this model has a head "
            "of its own, as after --rotate fold; leave that out"
        )
    _rope(config)
    if found.name in _LARGEST:
        _check_attention_scale(found.name, config)
    return found


# Blocks of the models whose queries llama.cpp scales by width / heads, not by the head's size.
_LARGEST = {"gemma2": 46, "gemma3": 62}


def _check_attention_scale(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a scale of attention that llama.cpp does not compute."""
    largest = int(config["num_hidden_layers"]) == _LARGEST[name]
    whole = int(config["hidden_size"]) / int(config["num_attention_heads"])
    expected = whole if largest else head_size(config)
    scalar = config.get("query_pre_attn_scalar")
    if scalar is not None and scalar != expected:
        raise GGUFError(
            f"llama.cpp's {name} divides scores by the root of {expected:g}, and this model's "
            f"query_pre_attn_scalar is {scalar:g}"
        )


def tensor_name(architecture: Architecture, name: str) -> str:
    """Return llama.cpp's name of a tensor of the model.

    Raises:
        GGUFError: the architecture has no such tensor.

    Example:
        >>> tensor_name(ARCHITECTURES["llama"], "model.layers.3.mlp.down_proj.weight")
        'blk.3.ffn_down.weight'
    """
    module, _, part = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{part}"
    prefix, _, inside = module.partition("model.layers.")
    index, _, local = inside.partition(".")
    if prefix or not index.isdigit() or local not in architecture.block:
        raise GGUFError(f"llama.cpp's {architecture.name} has no place for the tensor {name!r}")
    return f"blk.{index}.{architecture.block[local]}.{part}"


def rows_of(architecture: Architecture, name: str, config: Mapping[str, Any]) -> Tensor | None:
    """Return the order in which llama.cpp keeps the rows of a tensor; None for its own.

    transformers rotates the two halves of a head's coordinates against each other, llama.cpp's
    Llama neighbours: row 2 i of a head is transformers' i, row 2 i + 1 its i + half.
    """
    kind = name.rpartition(".")[0].rpartition(".")[2]
    if not architecture.permuted or kind not in ("q_proj", "k_proj"):
        return None
    heads = int(config["num_attention_heads"])
    if kind == "k_proj":
        heads = int(config.get("num_key_value_heads") or heads)
    size = head_size(config)
    rows = torch.arange(heads * size).reshape(heads, 2, size // 2)
    return rows.transpose(1, 2).reshape(-1)


def head_size(config: Mapping[str, Any]) -> int:
    """Return the coordinates of one attention head."""
    found = config.get("head_dim")
    return int(found or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters of (full) attention, checked.

    Raises:
        GGUFError: a kind that is not written here.
    """
    found = config.get("rope_parameters") or {}
    found = found.get("full_attention", found)
    kind = found.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise GGUFError(
            f"rope_type must be default, linear, llama3 or yarn for --format gguf, got {kind!r}"
        )
    theta = found.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**found, "rope_type": kind, "rope_theta": float(theta)}


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Return the frequency divisors of Llama 3's long context, float32 (head / 2,), or None.

    Source: Llama 3's reference code: wavelengths beyond the original context are stretched by
    `factor`, short ones are left, those between interpolated.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    size = head_size(config)
    frequency = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    wavelength = 2 * math.pi / frequency
    context = float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor = float(rope["factor"])
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return divisors.to(torch.float32)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the architecture's keys, without its prefix: (GGUF value type, value) by name."""
    architecture = architecture_of(config)
    heads = int(config["num_attention_heads"])
    size, rope = head_size(config), _rope(config)
    window = config.get("sliding_window")
    gemma = architecture.name in ("gemma2", "gemma3")
    windowed = bool(window) and config.get("use_sliding_window", True) is not False
    longest = int(config["max_position_embeddings"])
    if windowed and not gemma:
        # llama.cpp attends to everything in these; up to the window that is the same.
        longest = min(longest, int(str(window)))
    found: dict[str, tuple[str, Any]] = {
        "context_length": ("uint32", longest),
        "embedding_length": ("uint32", int(config["hidden_size"])),
        "block_count": ("uint32", int(config["num_hidden_layers"])),
        "feed_forward_length": ("uint32", int(config["intermediate_size"])),
        "attention.head_count": ("uint32", heads),
        "attention.head_count_kv": ("uint32", int(config.get("num_key_value_heads") or heads)),
        "attention.key_length": ("uint32", size),
        "attention.value_length": ("uint32", size),
        "attention.layer_norm_rms_epsilon": ("float32", float(config["rms_norm_eps"])),
        "rope.freq_base": ("float32", rope["rope_theta"]),
        "vocab_size": ("uint32", int(config["vocab_size"])),
    }
    if architecture.permuted:
        found["rope.dimension_count"] = ("uint32", size)
    if rope["rope_type"] in ("linear", "yarn"):
        found["rope.scaling.type"] = ("string", rope["rope_type"])
        found["rope.scaling.factor"] = ("float32", float(rope["factor"]))
        if rope.get("original_max_position_embeddings"):
            original = int(rope["original_max_position_embeddings"])
            found["rope.scaling.original_context_length"] = ("uint32", original)
    if gemma:
        if window:
            found["attention.sliding_window"] = ("uint32", int(window))
        local = (config.get("rope_parameters") or {}).get("sliding_attention", {})
        if architecture.name == "gemma3" and local.get("rope_theta"):
            found["rope.freq_base_swa"] = ("float32", float(local["rope_theta"]))
        for key, name in (
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ):
            if config.get(key):
                found[name] = ("float32", float(config[key]))
    return found
