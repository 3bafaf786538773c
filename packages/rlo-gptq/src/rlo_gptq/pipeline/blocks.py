"""From a model and a text to a packed checkpoint: one block at a time, each finished block on
disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rlo_core.lm.text import load_first_split
from rlo_core.lm.tokens import token_ids
from torch import Tensor
from transformers import AutoTokenizer

from rlo_gptq.calibration.block_inputs import Activations, BlockCall, run_sequences
from rlo_gptq.calibration.dense_pass import dense_outputs, first_inputs
from rlo_gptq.calibration.hessian_sum import CalibrationError
from rlo_gptq.calibration.sequences import digest_of, sample_sequences
from rlo_gptq.calibration.token_weights import sequence_weights, weighting_link
from rlo_gptq.formats.export import check_exportable
from rlo_gptq.formats.gguf.block import GGUFBlockQuantizer
from rlo_gptq.formats.gguf.finish import check_writable
from rlo_gptq.models.fold_checkpoint import (
    FoldedHead,
    fold_checkpoint,
    folded_copy,
    read_folded_head,
)
from rlo_gptq.models.layout import Layout, split_all_experts
from rlo_gptq.models.outside import Outside
from rlo_gptq.models.source import ModelSource, find_model, release
from rlo_gptq.models.stored_types import StoredTypes
from rlo_gptq.options import PLAIN, Options
from rlo_gptq.pipeline.block import BlockQuantizer
from rlo_gptq.pipeline.outside import OutsideQuantizer, fold_tensors, rest_names
from rlo_gptq.pipeline.plan import Plan, discover
from rlo_gptq.pipeline.processes import Processes
from rlo_gptq.pipeline.progress import Progress
from rlo_gptq.pipeline.work_folder import WorkFolder, discard_unless_begun


@dataclass
class Result:
    """What a quantization did.

    Args:
        records: One for each layer of the blocks: name, shape, proxy, seconds, tokens.
        outside: The same for embedding and head.
        tuned: One for each block that was finetuned: name, error before and after, epoch, seconds.
        resumed: Blocks that were on disk already.
        layout: Of the model.
        seqlen: Tokens of a calibration sequence.
        data: What identifies the calibration text.
    """

    records: list[dict[str, Any]]
    outside: list[dict[str, Any]]
    tuned: list[dict[str, Any]]
    resumed: int
    layout: Layout
    seqlen: int
    data: dict[str, Any]


def open_source(options: Options, model: Path, device: torch.device) -> ModelSource:
    """Open the dense model in `model`, as the options say."""
    return ModelSource(
        model,
        dtype=getattr(torch, options.dtype),
        device=device,
        trust_remote_code=options.trust_remote_code,
    )


def load_calibration(
    options: Options, source: ModelSource, seqlen: int
) -> tuple[Tensor, dict[str, Any]]:
    """Return the calibration sequences, (nsamples, seqlen), and what identifies them."""
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    wanted = [options.split] if options.split else ["train", "validation"]
    data, split = load_first_split(options.dataset, wanted)
    ids = token_ids(tokenizer, data)
    sequences = sample_sequences(ids, count=options.nsamples, length=seqlen, seed=options.seed)
    described = {"name": data.name, "split": split, "fingerprint": data.fingerprint}
    return sequences, described


def quantize_model(
    options: Options,
    folder: Path,
    processes: Processes,
    *,
    progress: Progress,
    on_start: Callable[[Plan, WorkFolder, dict[str, Any]], None] | None = None,
    finish: Callable[[WorkFolder, ModelSource, Plan], None],
    report: Callable[[Result, Plan], None] | None = None,
) -> Result:
    """Quantize a model into `folder`, or go on with what was begun there.

    Args:
        options: What to do.
        folder: The checkpoint's folder.
        processes: This process among its peers.
        progress: Is told of every layer.
        on_start: Called by the first process, with the plan, the folder and the data's description.
        finish: Called by the first process when all blocks are on disk, to make the checkpoint.
        report: Called by it afterwards; the folder counts as done when this has returned.

    Raises:
        RLOError: the model, the data or the folder is refused.
    """
    if options.hessian != PLAIN:
        weighting_link(options.hessian)  # a wrong spec is refused before anything is written
    if options.tune is not None and options.nsamples < 2:
        raise CalibrationError(
            f"tuning needs at least 2 calibration sequences, one to be held out, got "
            f"{options.nsamples}; give a larger --nsamples"
        )
    model = find_model(options.model)
    folded = folded_copy(folder)
    if options.rotate is not None:
        if processes.first:
            fold_checkpoint(model, folded, seed=options.seed)
        processes.wait()
        model = folded
    source = open_source(options, model, processes.device)
    try:
        folded_head = None if options.rotate is None else read_folded_head(model)
        plan = discover(source, options, folded=None if folded_head is None else folded_head.kind)
        if options.gguf is not None:
            source.came_as = StoredTypes()  # blocks are made of the widest values there are
            check_writable(source, plan.layout, plan.shapes, options)
        for name in options.formats:
            check_exportable(name, options.layer, plan.layout, plan.shapes)
        sequences, data = load_calibration(options, source, plan.seqlen)
        decisions = {
            **options.decisions(),
            "seqlen": plan.seqlen,
            "weights": source.fingerprint(),
            "tokens": digest_of(sequences),
            "data": data,
        }
        work = WorkFolder(folder, decisions)
        if processes.first:
            work.open()
            if on_start is not None:
                on_start(plan, work, data)
        run = _Run(
            options, source, plan.layout, plan.outside, folded_head, work, processes, progress
        )
        done = processes.broadcast({"done": work.done if processes.first else False}, 0)["done"]
        if not done:
            with torch.no_grad():
                run.all_blocks(sequences)
        result = Result(
            run.records, run.outside_records, run.tuned, run.resumed, plan.layout, plan.seqlen, data
        )
        if done and processes.first:
            work.clean()
        elif processes.first:
            finish(work, source, plan)
            if report is not None:
                report(result, plan)
            work.finish()  # last: a run killed before this makes its files again from its parts
        processes.wait()
        return result
    finally:
        source.close()
        if processes.first:
            discard_unless_begun(folded, folder)


@dataclass
class _Run:
    options: Options
    source: ModelSource
    layout: Layout
    outside: Outside
    folded_head: FoldedHead | None
    work: WorkFolder
    processes: Processes
    progress: Progress

    def __post_init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.outside_records: list[dict[str, Any]] = []
        self.tuned: list[dict[str, Any]] = []
        self.resumed = 0
        self.device = self.processes.device
        self.token_weights: Tensor | None = None

    def all_blocks(self, sequences: Tensor) -> None:
        self._save_rest()
        mine = list(self.processes.share(len(sequences)))
        if self.options.hessian != PLAIN:
            self.token_weights = self._weigh_tokens(sequences, mine)
        outside = OutsideQuantizer(
            self.options,
            self.source,
            self.layout,
            self.outside,
            self.folded_head,
            self.work,
            self.processes,
            note=self._done,
            token_weights=self.token_weights,
        )
        outside.embedding_first()
        activations, calls = first_inputs(
            self.source,
            self.layout,
            sequences,
            mine,
            offload=self._offload,
            loaded=outside.replace_embedding,
        )
        try:
            self._blocks_in_turn(activations, calls, mine, to_the_end=outside.head_waits)
            outside.head_last(activations, mine)
        finally:
            activations.close()

    def _blocks_in_turn(
        self,
        activations: Activations,
        calls: list[BlockCall],
        mine: Sequence[int],
        *,
        to_the_end: bool,
    ) -> None:
        """Quantize the blocks; `to_the_end` leaves the last one's outputs in `activations`."""
        kind = BlockQuantizer if self.options.gguf is None else GGUFBlockQuantizer
        blocks = kind(
            self.options,
            self.source,
            self.layout,
            self.work,
            self.processes,
            note=self._done,
            token_weights=self.token_weights,
        )
        for index in range(self.layout.count):
            name = self.layout.block_name(index)
            part = f"block-{index:05d}"
            exists = self.processes.broadcast({"exists": self.work.has(part)}, 0)["exists"]
            self.progress.block(index, self.layout.count, "replay" if exists else "quantize")
            if exists:
                self.resumed += 1
                for record in self.work.records(part) if self.processes.first else []:
                    self._done(record)
                if index + 1 == self.layout.count and not to_the_end:
                    continue
            block = self.source.load_module(name)
            if self.layout.experts:
                split_all_experts(block)
            if exists:
                blocks.restore(block, index, part)
            else:
                blocks.quantize(block, index, part, calls[index], activations, mine)
            if index + 1 < self.layout.count or to_the_end:
                run_sequences(block, calls[index], activations, activations, len(mine))
            release(block)

    def _save_rest(self) -> None:
        """Load what is outside of the blocks, and put it on disk for the checkpoint."""
        names = rest_names(self.source, self.layout, self.outside)
        if self.processes.first and not self.work.has("rest"):
            self.source.load(lambda name: name in names)
            state = self.source.model.state_dict()
            stored = {n: self.source.as_stored(n, state[n]) for n in names}
            tensors = {n: self.outside.as_stored(n, tensor) for n, tensor in stored.items()}
            self.work.save("rest", {**tensors, **fold_tensors(self.outside, self.folded_head)}, [])
            release(self.source.model)
        self.processes.wait()

    @property
    def _offload(self) -> Path | None:
        return self.work.folder if self.options.offload else None

    def _weigh_tokens(self, sequences: Tensor, mine: Sequence[int]) -> Tensor:
        """Run the original model over this process's sequences; return their tokens' weights."""
        link = weighting_link(self.options.hessian)
        weights = torch.empty(max(1, len(mine)), sequences.shape[1])
        with dense_outputs(
            self.source,
            self.layout,
            sequences,
            mine,
            offload=self._offload,
            note=lambda index, count: self.progress.block(index, count, "weigh tokens"),
        ) as (hidden, logits_of):
            for row, number in enumerate(mine):
                weights[row] = sequence_weights(
                    logits_of,
                    hidden.get(row, self.device),
                    sequences[number],
                    link,
                    energy=self.options.hessian_energy,
                )
        return weights

    def _done(self, record: dict[str, Any]) -> None:
        """Note the record of a layer, or of a finetuned block, and tell of it."""
        if "layer" in record:
            (self.outside_records if record.get("outside") else self.records).append(record)
            self.progress.layer(record)
        else:
            self.tuned.append(record)
            self.progress.tuned(record)
