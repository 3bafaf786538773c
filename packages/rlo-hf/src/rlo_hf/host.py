"""What `rlo` knows of this host."""

from __future__ import annotations

from rlo_core.hosts import Host

HOST = Host(
    name="hf",
    summary="rooted losses in Hugging Face's Trainer and TRL, and a finetuning command",
    command="rlo_hf.cli:main",
    requires={"transformers": ">=5.11,<6", "accelerate": ">=1.10"},
    optional={
        "peft": ">=0.18",
        "trl": ">=1.16,<2",
        "gguf": ">=0.11",
        "llamafactory": ">=0.9.5",
        "ms-swift": ">=4.6",
        "axolotl": "",
        "torchtitan": ">=0.3",
    },
)

COMPARER = Host(
    name="hf",
    summary="a causal language model finetuned on text, as by `rlo-hf finetune`",
    command="rlo_hf.compare_command:command",
)
