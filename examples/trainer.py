"""transformers' Trainer under a rooted loss, with true perplexity beside the objective.

    python examples/trainer.py

A tiny Llama learns Python's own language reference, byte by byte; nothing is downloaded.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from rlo_hf import Trainer
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

BLOCK = 64


def rows(text: str, count: int) -> list[dict[str, list[int]]]:
    """Return the first `count` rows of `BLOCK` bytes."""
    data = text.encode()
    blocks = [list(data[i * BLOCK : (i + 1) * BLOCK]) for i in range(count)]
    return [{"input_ids": block, "labels": block} for block in blocks]


def main() -> None:
    """Train and evaluate under cross entropy and under the bounded loss."""
    torch.set_num_threads(1)
    text = "\n".join(topics[name] for name in sorted(topics))
    half = len(text) // 2
    train, held_out = rows(text[:half], 320), rows(text[half:], 64)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=BLOCK,
    )
    for loss in ("ce", "rlo:k=5"):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            "runs/example-trainer",
            max_steps=60,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            LlamaForCausalLM(config),
            arguments,
            train_dataset=train,
            eval_dataset=held_out,
            loss=loss,
        )
        trainer.train()
        scores = trainer.evaluate()
        print(
            f"{loss:8} objective {scores['eval_loss']:.3f}, "
            f"true perplexity per byte {scores['eval_perplexity']:.2f}"
        )


if __name__ == "__main__":
    main()
