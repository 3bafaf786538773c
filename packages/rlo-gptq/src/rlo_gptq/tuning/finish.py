"""The tuned checkpoint: the packed one's files, with the trained tensors in their place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlo_core.files import write_text
from safetensors import safe_open

from rlo_gptq.checkpoint.validation import read_object, require, weight_paths
from rlo_gptq.models.shards import ShardWriter

CARD = "README.md"
_HEADING = "## Tuned end to end"


def write_tuned(folder: Path, best: Path, out: Path, summary: Mapping[str, Any]) -> int:
    """Write a checkpoint with other values of some tensors; return the bytes of its weight files.

    Args:
        folder: The packed checkpoint.
        best: A safetensors file with the new values, under the names in the checkpoint.
        out: The new checkpoint's folder.
        summary: What the model card says of the tuning.

    Raises:
        CheckpointError: a new value is of no tensor of the checkpoint.
    """
    writer = ShardWriter(out, digests=True)
    with safe_open(best, framework="pt") as trained:
        left = set(trained.keys())
        for file in weight_paths(folder):
            with safe_open(file, framework="pt") as stored:
                tensors = {
                    name: (trained if name in left else stored).get_tensor(name)
                    for name in stored.keys()  # noqa: SIM118 - it is no mapping
                }
            left -= set(tensors)
            writer.add(file.name, tensors)
    require(not left, f"{str(folder)!r} has no tensor {min(left, default='')!r}")
    _write_card(folder / CARD, out / CARD, summary)
    return writer.finish(read_object(folder / "config.json"), texts=folder)


def _write_card(before: Path, after: Path, summary: Mapping[str, Any]) -> None:
    if not before.is_file():
        return
    text = before.read_text("utf-8").partition(f"\n{_HEADING}")[0]
    write_text(
        after,
        f"{text.rstrip()}\n\n{_HEADING}\n\n"
        "Scales, norms and what else is stored beside the codes were trained for the KL divergence "
        "to the\noriginal model's next-token distribution, codes fixed: "
        f"{summary['held_out_kl_before']:.4f} -> {summary['held_out_kl_after']:.4f} nats on text "
        f"held out,\nat step {summary['best_step']} of {summary['steps']}. The errors of layers "
        "above are those of rounding.\n",
    )
