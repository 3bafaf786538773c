"""Peak memory of a quantization does not grow with the number of blocks."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

import pytest
import transformers
from rlo_gptq.settings import LayerSettings
from tokenizers import Tokenizer, models, pre_tokenizers

WIDTH, INNER = 256, 1024


def save_llama(folder: Path, blocks: int) -> int:
    """Save a Llama without training; return the bytes of its weights."""
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_blocks(text_file, quantize_to, tmp_path):
    """One block is in memory at a time: six times the blocks cost a fraction of their bytes."""
    layer = LayerSettings(bits=2, method="nearest", incoherence="hadamard")

    def measured(folder: Path, out: Path, queue) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        quantize_to(folder, text_file, out, layer, nsamples=2, seqlen=64)
        queue.put(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    context = multiprocessing.get_context("fork")
    sizes, growths = [], []
    for blocks in (4, 24):
        folder = tmp_path / f"model-{blocks}"
        sizes.append(save_llama(folder, blocks))
        queue = context.Queue()
        process = context.Process(target=measured, args=(folder, tmp_path / f"q{blocks}", queue))
        process.start()
        growths.append(queue.get(timeout=500))
        process.join()
    assert growths[1] - growths[0] < 0.4 * (sizes[1] - sizes[0])
