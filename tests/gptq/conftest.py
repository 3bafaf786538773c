"""Small language models of many families, made in a second, and a tokenizer without a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rlo_gptq.demo import byte_tokenizer
from rlo_gptq.options import Options
from rlo_gptq.pipeline.blocks import Result, quantize_model
from rlo_gptq.pipeline.finish import write_checkpoint
from rlo_gptq.pipeline.processes import Processes
from rlo_gptq.settings import LayerSettings

SMALL = {
    "vocab_size": 259,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
PLAIN = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SMALL, "num_key_value_heads": 4}),
    "llama-gqa-tied": ("LlamaConfig", {**SMALL, "tie_word_embeddings": True}),
    "opt": (
        "OPTConfig",
        {
            **{k: v for k, v in PLAIN.items() if k != "intermediate_size"},
            "ffn_dim": 44,
            "word_embed_proj_dim": 24,
            "do_layer_norm_before": True,
        },
    ),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 6}),
    "gemma2": ("Gemma2Config", {**SMALL, "head_dim": 6, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**SMALL, "head_dim": 6, "sliding_window": 8}),
    "phi": ("PhiConfig", {**SMALL, "hidden_size": 32}),
    "phi3": ("Phi3Config", SMALL),
    "gpt-neox": ("GPTNeoXConfig", PLAIN),
    "mixtral": ("MixtralConfig", {**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            **SMALL,
            "head_dim": 6,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
}


def save_model(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # drawn at 0.02, so that blocks would hardly change their input
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a family's name to the folder of a small model of it."""
    made: dict[Any, Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float32) -> Path:
        key = (family, dtype)
        if key not in made:
            made[key] = save_model(family, tmp_path_factory.mktemp(family), dtype=dtype)
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some text that is not all alike."""
    generator = torch.Generator().manual_seed(1)
    words = ["red", "ball", "girl", "went", "out", "the", "a", "house", "to", "see", "sun", "and"]
    chosen = torch.randint(0, len(words), (1500,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[i] for i in chosen), encoding="utf-8")
    return path


class Silent:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, int, str]] = []
        self.layers: list[dict[str, Any]] = []
        self.blocks_tuned: list[dict[str, Any]] = []

    def block(self, index: int, count: int, status: str) -> None:
        self.blocks.append((index, count, status))

    def layer(self, record: dict[str, Any]) -> None:
        self.layers.append(record)

    def tuned(self, record: dict[str, Any]) -> None:
        self.blocks_tuned.append(record)


def quantize(
    model: Path,
    text: Path,
    out: Path,
    layer: LayerSettings | None = None,
    *,
    progress: Silent | None = None,
    processes: Processes | None = None,
    **options: Any,
) -> Result:
    """Quantize in this process; small and quick unless told otherwise."""
    layer = layer or LayerSettings(bits=4, method="gptq", incoherence="hadamard")
    chosen = Options(
        model=str(model),
        dataset=str(text),
        layer=layer,
        # Embedding and head as they are: tests/gptq/test_outside.py quantizes them.
        **{"nsamples": 4, "seqlen": 32, "embed_bits": 32, "head_bits": 32, **options},
    )
    return quantize_model(
        chosen,
        out,
        processes or Processes(0, 1, torch.device("cpu")),
        progress=progress or Silent(),
        finish=lambda work, source, layout: write_checkpoint(
            work, source, layout, layer, base=str(model), dataset=str(text)
        ),
    )


@pytest.fixture(scope="session")
def quantize_to() -> Callable[..., Result]:
    """`quantize` of this module."""
    return quantize


@pytest.fixture
def silent() -> Silent:
    """A progress that keeps what it is told."""
    return Silent()


@pytest.fixture(scope="session")
def quantized(
    model_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small Llama at 3 bits with incoherence; not to be changed."""
    out = tmp_path_factory.mktemp("quantized") / "model"
    layer = LayerSettings(bits=3, method="gptq", incoherence="hadamard", rescale=True)
    quantize(model_folder("llama-gqa-tied"), text_file, out, layer)
    return out
