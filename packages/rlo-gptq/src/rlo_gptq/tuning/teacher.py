"""What the dense model says of the text: computed once, block by block, and kept in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlo_gptq.calibration.dense_pass import dense_outputs
from rlo_gptq.models.layout import Layout
from rlo_gptq.models.source import ModelSource
from rlo_gptq.pipeline.processes import Processes
from rlo_gptq.pipeline.work_folder import WorkFolder
from rlo_gptq.tuning.divergence import Target, known_part, logit_rows


def part_name(number: int) -> str:
    """Return the name of the part that holds what is known of a sequence."""
    return f"teacher-{number:06d}"


@torch.no_grad()
def write_targets(
    source: ModelSource,
    layout: Layout,
    sequences: Tensor,
    work: WorkFolder,
    processes: Processes,
    *,
    k: int,
    offload: Path | None,
    note: Callable[[int, int], None],
) -> None:
    """Write the top k of the dense model's distribution for each sequence that has none yet.

    Args:
        source: The dense model.
        layout: Of its blocks.
        sequences: Token ids, (count, tokens).
        work: Where the files go, one for each sequence.
        processes: This process among its peers; each does its share.
        k: Tokens that are kept.
        offload: A folder to keep hidden states in; None for memory.
        note: Is told of every block: its number, and how many there are.
    """
    mine = [n for n in processes.share(len(sequences)) if not work.has(part_name(n))]
    if not mine:
        return
    rows = logit_rows(source.config.get_text_config(decoder=True).vocab_size)
    with dense_outputs(source, layout, sequences, mine, offload=offload, note=note) as (
        hidden,
        logits_of,
    ):
        for row, number in enumerate(mine):
            state, ids = hidden.get(row, source.device), sequences[number]
            # Nothing follows the last token; what stands in for it is left out of every mean.
            following = torch.cat([ids[1:], ids[:1]]).to(source.device)
            parts = [
                known_part(logits_of(state[:, at : at + rows])[0], following[at : at + rows], k)
                for at in range(0, len(ids), rows)
            ]
            tensors = {
                "tokens": torch.cat([part.tokens for part in parts]).int(),
                "probabilities": torch.cat([part.probabilities for part in parts]),
                "rest": torch.cat([part.rest for part in parts]),
                "ce": torch.cat([part.ce for part in parts]),
            }
            work.save(part_name(number), tensors, [])


def read_target(work: WorkFolder, number: int, device: torch.device) -> Target:
    """Return what `write_targets` wrote of a sequence."""
    found = load_file(work.part(part_name(number)), device=str(device))
    return Target(found["tokens"].long(), found["probabilities"], found["rest"], found["ce"])
