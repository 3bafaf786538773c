"""What decides a finetuning. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FinetuneOptions:
    """What decides a finetuning. The defaults are the authors' where they have one.

    Args:
        model: A folder, a .gguf file or a hub name.
        dataset: What `rlo_core.lm.text.load_text` takes.
        loss: The spec.
        out: The run folder.
        epochs: Passes over the training text.
        max_steps: Stop after this many updates; -1 for none.
        block: Tokens per training row.
        batch_size: Rows per batch and process. The authors' script leaves transformers' 8.
        accumulation: Batches per update.
        learning_rate: Peak of a linear schedule.
        warmup: Updates of warm-up; None is the authors' 500, but no more than a tenth of the run.
        weight_decay: Of AdamW.
        precision: "fp32", "fp16", "bf16"; "auto" is the authors' fp16 on a GPU and fp32 elsewhere.
        seed: Of everything random.
        train_split: The split that is trained on.
        eval_dataset: Where perplexity is measured; None for `dataset`.
        eval_split: The split of it; text without splits has its last tenth held out instead.
        eval_context: Tokens per perplexity window; None is the model's context, at most 2,048.
        eval_tokens: Measure on at most this many tokens; None for all.
        train_tokens: Train on at most this many tokens; None for all.
        text_column: The text column of a table.
        lora: Rank of LoRA adapters on every linear layer; 0 trains all weights.
        lora_alpha: Their scale; None is twice the rank.
        lora_init: How they begin: "default" adds nothing, "loftq" corrects the quantization error.
        original: For "loftq", the model that was quantized.
        gradient_checkpointing: Recompute activations.
        linear: See `rlo_hf.trainer.Trainer`.
        teacher: The model that a loss with `+kl` is held to; without such a term `+kl:beta=1` is
            added. None for the model without its adapters.
        trust_remote_code: Run code that comes with the model.
    """

    model: str
    dataset: str
    loss: str = "rlo:k=5,m=5"
    out: str = "runs/finetune"
    epochs: float = 3.0
    max_steps: int = -1
    block: int = 256
    batch_size: int = 8
    accumulation: int = 2
    learning_rate: float = 1e-5
    warmup: int | None = None
    weight_decay: float = 0.01
    precision: str = "auto"
    seed: int = 42
    train_split: str = "train"
    eval_dataset: str | None = None
    eval_split: str = "validation"
    eval_context: int | None = None
    eval_tokens: int | None = None
    train_tokens: int | None = None
    text_column: str | None = None
    lora: int = 0
    lora_alpha: int | None = None
    lora_init: Literal["default", "loftq"] = "default"
    original: str | None = None
    gradient_checkpointing: bool = False
    linear: Literal["auto", "fused", "off"] = "auto"
    trust_remote_code: bool = False
    teacher: str | None = None

    def __post_init__(self) -> None:
        for name in ("block", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, or -1, got {self.max_steps}")
        if self.teacher is not None and "+kl" not in self.loss:
            object.__setattr__(self, "loss", f"{self.loss}+kl:beta=1")
        if not self.epochs > 0:
            raise ValueError(f"epochs must be positive, got {self.epochs}")
