"""Quantize a language model to 2 bits, load the packed checkpoint, generate, measure.

    python examples/quantize_and_generate.py [--steps 150]

Nothing is downloaded: a small Llama is trained first, on source of Python's standard library, one
token a byte. It is left in runs/example-lm/model, its 2-bit form in runs/example-lm/2bit.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
import typing
from pathlib import Path

import rlo_gptq
import torch
from rlo_gptq.cli.main import main as rlo_gptq_command
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path("runs/example-lm")
CONTEXT = 128


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 256 tokens, one for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def train(ids: torch.Tensor, steps: int) -> LlamaForCausalLM:
    """Return a small Llama trained on `ids`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        first = torch.randint(len(ids) - CONTEXT, (8, 1))
        batch = ids[first + torch.arange(CONTEXT)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model


def main() -> None:
    """Train, quantize, generate, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    text = FOLDER / "text.txt"
    text.write_text(inspect.getsource(typing), encoding="utf-8")

    tokenizer = byte_tokenizer()
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    model = train(ids, steps)
    model.save_pretrained(FOLDER / "model")
    tokenizer.save_pretrained(FOLDER / "model")

    # The same as on a command line: rlo-gptq quantize MODEL TEXT --wbits 2 ... --save DIR
    quantize = ["quantize", str(FOLDER / "model"), str(text), "--wbits", "2", "--incoh-processing"]
    settings = ["--nsamples", "16", "--seqlen", str(CONTEXT), "--save", str(FOLDER / "2bit")]
    rlo_gptq_command([*quantize, *settings], standalone_mode=False)

    packed = rlo_gptq.load(FOLDER / "2bit")
    prompt = tokenizer("def ", return_tensors="pt")
    prompt.pop("token_type_ids", None)
    tokens = packed.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    print("2 bits writes:", repr(tokenizer.decode(tokens[0])))
    held_out = ids[-CONTEXT * 16 :].view(16, CONTEXT)
    for name, candidate in (("float32", model), ("2 bits", packed)):
        with torch.inference_mode():
            loss = candidate(input_ids=held_out, labels=held_out).loss
        size = sum(
            file.stat().st_size
            for file in (FOLDER / ("model" if name == "float32" else "2bit")).glob("*.safetensors")
        )
        print(f"{name:8} perplexity per byte {loss.exp().item():6.2f}, {size:>9,} bytes")


if __name__ == "__main__":
    main()
