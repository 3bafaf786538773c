"""Tiny models of every kind, built from configurations."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from torch import nn

V = 37
CAUSAL = ("gpt2", "opt", "llama", "qwen2", "gemma2", "cohere", "granite")
SEQ2SEQ = ("t5", "bart")

_LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENDS = {"bos_token_id": 0, "eos_token_id": 1}
_LLAMA = {
    **_LAYERS,
    **_ENDS,
    "intermediate_size": 32,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
_BERT = {**_LAYERS, "num_hidden_layers": 1, "intermediate_size": 32}
_BART = {
    "d_model": 16,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 2, "forced_eos_token_id": 2},
}
_T5 = {
    **{"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    **{"dropout_rate": 0.0, "decoder_start_token_id": 0},
}
_VIT = {**_BERT, "image_size": 8, "patch_size": 4, "num_labels": 5}

# Name: the family in transformers, the head, the configuration.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2", "LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, **_ENDS}),
    "opt": ("OPT", "ForCausalLM", {**_LAYERS, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "llama": ("Llama", "ForCausalLM", _LLAMA),
    "qwen2": ("Qwen2", "ForCausalLM", _LLAMA),
    "gemma2": ("Gemma2", "ForCausalLM", {**_LLAMA, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "cohere": ("Cohere", "ForCausalLM", {**_LLAMA, "logit_scale": 0.25}),
    "granite": ("Granite", "ForCausalLM", {**_LLAMA, "logits_scaling": 8.0}),
    "mixtral": (
        "Mixtral",
        "ForCausalLM",
        {
            **_LLAMA,
            "num_local_experts": 4,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.1,
        },
    ),
    "t5": ("T5", "ForConditionalGeneration", _T5),
    "bart": ("Bart", "ForConditionalGeneration", _BART),
    "bert_mlm": ("Bert", "ForMaskedLM", _BERT),
    "bert_token": ("Bert", "ForTokenClassification", {**_BERT, "num_labels": 5}),
    "bert_sequence": ("Bert", "ForSequenceClassification", {**_BERT, "num_labels": 5}),
    "bert_multi_label": (
        "Bert",
        "ForSequenceClassification",
        {**_BERT, "num_labels": 5, "problem_type": "multi_label_classification"},
    ),
    "vit": ("ViT", "ForImageClassification", _VIT),
}


def build(name: str, *, vocab_size: int = V, length: int = 32) -> nn.Module:
    """Return the model with weights large enough that losses differ, and without dropout."""
    family, head, settings = MODELS[name]
    if name != "vit":
        settings = {**settings, "vocab_size": vocab_size}
    if name not in ("t5", "vit"):
        settings["n_positions" if name == "gpt2" else "max_position_embeddings"] = length
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{family}Config")(**settings)
        model: nn.Module = getattr(transformers, f"{family}{head}")(config)
    _without_dropout(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def _without_dropout(model: nn.Module) -> None:
    """In the modules, and in the configuration for whoever loads the saved model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    for name, value in vars(model.config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(model.config, name, 0.0)


def byte_tokenizer(**special: Any) -> Any:
    """Return a tokenizer whose tokens are bytes, after the special ones (`eos_token="~"`)."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    first = [t for n, t in special.items() if n.endswith("_token") and t not in alphabet]
    vocabulary = {token: i for i, token in enumerate([*first, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
