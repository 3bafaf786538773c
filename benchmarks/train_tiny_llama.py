"""Train a small Llama whose widths are multiples of 256, which GGUF's K types need, on TinyStories.

    python benchmarks/train_tiny_llama.py --data DIR --out MODEL

3 million parameters, a few CPU minutes; DIR is the folder of real data. The last 400 stories are
held out. The tokenizer is that of stories260k (512 tokens).
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from bench_models import split_stories
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def token_stream(tokenizer_folder: Path, text: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    stories = text.read_text(encoding="utf-8").split("<|endoftext|>")
    ids = tokenizer([story.strip() for story in stories if story.strip()])["input_ids"]
    return torch.tensor([token for story in ids for token in story])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    torch.manual_seed(0)
    source = args.data / "stories260k"
    with tempfile.TemporaryDirectory() as scratch:
        folder = split_stories(args.data, Path(scratch))
        train = token_stream(source, folder / "train.txt")
        test = token_stream(source, folder / "test.txt")[: 16 * args.length + 1]
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    began = time.monotonic()
    for step in range(args.steps):
        rate = min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * max(rate, 0.02)
        starts = torch.randint(len(train) - args.length - 1, (args.batch,))
        ids = torch.stack([train[s : s + args.length] for s in starts.tolist()])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step + 1 == args.steps:
            print(f"{step}: {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        ids = test[: 16 * args.length].view(16, args.length)
        print(f"held out: {math.exp(model(input_ids=ids, labels=ids).loss):.3f}")
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(source).save_pretrained(args.out)


if __name__ == "__main__":
    main()
