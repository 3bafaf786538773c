"""From a model and a text to a packed checkpoint: one block at a time, each finished block on
disk.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rlo_core.errors import RLOError
from rlo_core.text import load_text
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer

from rlo_gptq.calibrate import (
    Activations,
    BlockCall,
    check_same_calls,
    collect_hessians,
    input_groups,
    record_inputs,
    sample_sequences,
    token_ids,
)
from rlo_gptq.fold_checkpoint import fold_checkpoint
from rlo_gptq.hessian import CalibrationError
from rlo_gptq.layer import quantize_layer
from rlo_gptq.models import Layout, split_all_experts
from rlo_gptq.options import PLAIN, layer_seed
from rlo_gptq.options import Options as Options
from rlo_gptq.plan import Plan, discover
from rlo_gptq.processes import Processes
from rlo_gptq.progress import Progress
from rlo_gptq.quant_linear import QuantLinear
from rlo_gptq.source import ModelSource, find_model, release, require_filled
from rlo_gptq.stages import linear_of, stages
from rlo_gptq.token_weights import sequence_weights, tail, weighting_link
from rlo_gptq.tune import dense_outputs, restore_norms, tune_block
from rlo_gptq.work import WorkFolder


class LayerError(RLOError):
    """A layer that cannot be quantized."""


@dataclass
class Result:
    """What a quantization did.

    Args:
        records: One for each layer: name, shape, proxy, seconds, tokens.
        tuned: One for each block that was finetuned: name, error before and after, epoch, seconds.
        resumed: Blocks that were on disk already.
        layout: Of the model.
        seqlen: Tokens of a calibration sequence.
        data: What identifies the calibration text.
    """

    records: list[dict[str, Any]]
    tuned: list[dict[str, Any]]
    resumed: int
    layout: Layout
    seqlen: int
    data: dict[str, Any]


def load_calibration(
    options: Options, source: ModelSource, seqlen: int
) -> tuple[Tensor, dict[str, Any]]:
    """Return the calibration sequences, (nsamples, seqlen), and what identifies them."""
    from rlo_core.errors import DataError

    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    wanted = [options.split] if options.split else ["train", "validation"]
    for split in wanted:
        try:
            data = load_text(options.dataset, split)  # type: ignore[arg-type]
            break
        except DataError:
            if split == wanted[-1]:
                raise
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
    finish: Callable[[WorkFolder, ModelSource, Layout], None],
) -> Result:
    """Quantize a model into `folder`, or go on with what was begun there.

    Args:
        options: What to do.
        folder: The checkpoint's folder.
        processes: This process among its peers.
        progress: Is told of every layer.
        on_start: Called by the first process, with the plan, the folder and the data's description.
        finish: Called by the first process when all blocks are on disk, to make the checkpoint.

    Raises:
        RLOError: the model, the data or the folder is refused.
    """
    if options.hessian != PLAIN:
        weighting_link(options.hessian)  # a wrong spec is refused before anything is written
    model = find_model(options.model)
    folded = folder.with_name(f".{folder.name}.folded")
    if options.rotate is not None:
        if processes.first:
            fold_checkpoint(model, folded, seed=options.seed)
        processes.wait()
        model = folded
    source = ModelSource(
        model,
        dtype=getattr(torch, options.dtype),
        device=processes.device,
        trust_remote_code=options.trust_remote_code,
    )
    try:
        plan = discover(source, options)
        sequences, data = load_calibration(options, source, plan.seqlen)
        tokens = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()[:16]
        decisions = {
            **options.decisions(),
            "seqlen": plan.seqlen,
            "weights": source.fingerprint(),
            "tokens": tokens,
            "data": data,
        }
        work = WorkFolder(folder, decisions)
        if processes.first:
            work.open()
            if on_start is not None:
                on_start(plan, work, data)
        run = _Run(options, source, plan.layout, work, processes, progress)
        done = processes.broadcast({"done": work.done if processes.first else False}, 0)["done"]
        if not done:
            with torch.no_grad():
                run.all_blocks(sequences)
            if processes.first:
                finish(work, source, plan.layout)
        processes.wait()
        if processes.first:
            shutil.rmtree(folded, ignore_errors=True)
        return Result(run.records, run.tuned, run.resumed, plan.layout, plan.seqlen, data)
    finally:
        source.close()


@dataclass
class _Run:
    options: Options
    source: ModelSource
    layout: Layout
    work: WorkFolder
    processes: Processes
    progress: Progress

    def __post_init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.tuned: list[dict[str, Any]] = []
        self.resumed = 0
        self.device = self.processes.device
        self.token_weights: Tensor | None = None

    def all_blocks(self, sequences: Tensor) -> None:
        if self.options.tune is not None and len(sequences) < 2:
            raise CalibrationError(
                f"tuning needs at least 2 calibration sequences, one to be held out, got "
                f"{len(sequences)}; give a larger --nsamples"
            )
        self._save_rest()
        mine = list(self.processes.share(len(sequences)))
        if self.options.hessian != PLAIN:
            self.token_weights = self._weigh_tokens(sequences, mine)
        activations, calls = self._first_inputs(sequences, mine)
        try:
            self._blocks_in_turn(activations, calls, mine)
        finally:
            activations.close()

    def _blocks_in_turn(
        self, activations: Activations, calls: list[BlockCall], mine: Sequence[int]
    ) -> None:
        for index in range(self.layout.count):
            name = self.layout.block_name(index)
            part = f"block-{index:05d}"
            there = self.processes.broadcast({"there": self.work.has(part)}, 0)["there"]
            self.progress.block(index, self.layout.count, "replay" if there else "quantize")
            if there:
                self.resumed += 1
                for record in self.work.records(part) if self.processes.first else []:
                    self._done(record)
                if index + 1 == self.layout.count:
                    continue
            block = self.source.load_module(name)
            split_all_experts(block)
            if there:
                self._restore(block, name, part)
            else:
                self._quantize_block(block, index, part, calls[index], activations, mine)
            if index + 1 < self.layout.count:
                for row, _ in enumerate(mine):
                    hidden = activations.get(row, self.device)
                    activations.set(row, calls[index].run(block, hidden))
            release(block)

    def _save_rest(self) -> None:
        """Load what is outside of the blocks, and put it on disk for the checkpoint."""
        blocks = f"{self.layout.blocks}."
        tied = set(self.source.model.all_tied_weights_keys)
        names = self.source.targets(lambda name: not name.startswith(blocks) and name not in tied)
        if self.processes.first and not self.work.has("rest"):
            self.source.load(lambda name: name in names)
            state = self.source.model.state_dict()
            self.work.save("rest", {n: self._as_stored(n, state[n]) for n in names}, [])
            release(self.source.model)
        self.processes.wait()

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        stored = self.source.stored.get(name)
        return tensor if stored is None or not tensor.is_floating_point() else tensor.to(stored)

    def _first_inputs(
        self, sequences: Tensor, mine: Sequence[int]
    ) -> tuple[Activations, list[BlockCall]]:
        """Return the first block's inputs for this process's sequences, and how blocks are
        called.
        """
        model, blocks = self.source.model, self.layout.blocks
        modules = list(model.get_submodule(blocks).children())
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        unused = {f"{name}.weight" for name, module in model.named_modules() if module is head}
        self.source.load(lambda name: not name.startswith(f"{blocks}.") and name not in unused)
        require_filled(model, except_for=(f"{blocks}.", *unused, *model.all_tied_weights_keys))
        hidden, calls = record_inputs(model, modules, sequences[0], self.device)
        activations = Activations(
            max(1, len(mine)),
            hidden.shape[1],
            hidden.shape[2],
            hidden.dtype,
            self.work.folder if self.options.offload else None,
        )
        for row, index in enumerate(mine):
            hidden, others = record_inputs(model, modules, sequences[index], self.device)
            if row < 2:  # one other sequence is enough to see a difference
                check_same_calls(calls, others, type(model).__name__)
            activations.set(row, hidden)
        release(model)
        return activations, calls

    def _weigh_tokens(self, sequences: Tensor, mine: Sequence[int]) -> Tensor:
        """Run the original model over this process's sequences; return their tokens' weights."""
        link = weighting_link(self.options.hessian)
        activations, calls = self._first_inputs(sequences, mine)
        model, path = self.source.model, self.layout.blocks
        for index in range(self.layout.count):
            self.progress.block(index, self.layout.count, "weigh tokens")
            block = self.source.load_module(self.layout.block_name(index))
            for row, _ in enumerate(mine):
                hidden = activations.get(row, self.device)
                activations.set(row, calls[index].run(block, hidden))
            release(block)
        tied = model.all_tied_weights_keys
        self.source.load(lambda name: not name.startswith(f"{path}."))
        model.tie_weights()
        require_filled(model, except_for=(f"{path}.", *tied))
        blocks = list(model.get_submodule(path).children())
        weights = torch.empty(max(1, len(mine)), sequences.shape[1])
        with tail(model, blocks) as logits_of:
            for row, number in enumerate(mine):
                weights[row] = sequence_weights(
                    logits_of,
                    activations.get(row, self.device),
                    sequences[number],
                    link,
                    energy=self.options.hessian_energy,
                )
        release(model)
        return weights

    def _quantize_block(
        self,
        block: nn.Module,
        index: int,
        part: str,
        call: BlockCall,
        activations: Activations,
        mine: Sequence[int],
    ) -> None:
        linears = self.layout.linears[index]
        name = self.layout.block_name(index)
        packed: dict[str, QuantLinear] = {}
        records: list[dict[str, Any]] = []
        groups: list[list[str]] = []
        tune = self.options.tune is not None and bool(linears)
        targets = self._like(activations) if tune else None
        if targets is not None:
            dense_outputs(block, call, activations, targets, len(mine))
        if linears:
            groups = input_groups(block, linears, call, activations.get(0, self.device))
            # Each process traces its own sequence, and experts are reached by some only.
            groups = self.processes.broadcast({"groups": groups}, 0)["groups"]
        for stage in stages(block, groups):
            rows = list(range(len(mine)))
            begin = time.perf_counter()
            firsts = [group[0] for group in stage]
            sums = collect_hessians(
                block,
                firsts,
                call,
                activations,
                rows,
                self.device,
                token_weights=self.token_weights,
            )
            for first in firsts:
                self.processes.sum_hessian(sums[first])
            collected = time.perf_counter() - begin
            done = self._round_stage(block, name, stage, sums, collected, records)
            packed.update(done)
            if self.options.true_sequential:
                self._use(block, done)
        if not self.options.true_sequential:
            self._use(block, packed)
        if targets is not None:
            records.append(self._tune(block, name, packed, call, activations, targets, mine))
            targets.close()
        if self.processes.first:
            self.work.save(part, self._tensors(block, name, packed), records)
        self.processes.wait()

    def _like(self, activations: Activations) -> Activations:
        """Return room for hidden states of the same sequences, kept in the same way."""
        folder = self.work.folder if self.options.offload else None
        return Activations(*activations.shape, activations.dtype, folder)

    def _tune(
        self,
        block: nn.Module,
        name: str,
        packed: dict[str, QuantLinear],
        call: BlockCall,
        activations: Activations,
        targets: Activations,
        mine: Sequence[int],
    ) -> dict[str, Any]:
        """Finetune scales and norms, and put them in place; returns the block's record."""
        assert self.options.tune is not None
        measured = tune_block(
            block,
            packed,
            call,
            activations,
            targets,
            mine,
            self.options.tune,
            count=self.options.nsamples,
            seed=layer_seed(self.options.seed, f"{name}.tune"),
            stored=lambda child, tensor: self._as_stored(f"{name}.{child}", tensor),
            processes=self.processes,
            token_weights=self.token_weights,
        )
        self._use(block, packed)
        record = {"block": name, **measured}
        self._done(record)
        return record

    def _done(self, record: dict[str, Any]) -> None:
        """Note the record of a layer, or of a finetuned block, and tell of it."""
        if "layer" in record:
            self.records.append(record)
            self.progress.layer(record)
        else:
            self.tuned.append(record)
            self.progress.tuned(record)

    def _round_stage(
        self,
        block: nn.Module,
        name: str,
        stage: Sequence[Sequence[str]],
        sums: dict[str, Any],
        collected: float,
        records: list[dict[str, Any]],
    ) -> dict[str, QuantLinear]:
        """Round the layers of a stage; the processes share them, and all get all results."""
        results: dict[str, QuantLinear] = {}
        layers = [(group[0], layer) for group in stage for layer in group]
        owned = set(self.processes.share(len(layers)))
        local: dict[int, tuple[QuantLinear, dict[str, Any]]] = {}
        first_now, hessian = "", torch.empty(0)
        tokens = {first: sums[first].tokens for first in sums}
        for number, (first, layer) in enumerate(layers):
            if first != first_now:
                hessian = sums.pop(first).mean(f"{name}.{first}")
                first_now = first
            if number not in owned:
                continue
            begin = time.perf_counter()
            linear = linear_of(block, layer)
            # One rotation for all layers that read the same input.
            seed = layer_seed(self.options.seed, f"{name}.{first}")
            try:
                rounded = quantize_layer(linear.weight, hessian, self.options.layer, seed=seed)
            except ValueError as error:
                raise LayerError(f"layer '{name}.{layer}': {error}") from error
            record = {
                "layer": f"{name}.{layer}",
                "rows": linear.out_features,
                "columns": linear.in_features,
                "bits": self.options.layer.bits,
                "proxy": rounded.proxy,
                "tokens": tokens[first],
                "seconds": round(time.perf_counter() - begin, 4),
                "calibration_seconds": round(collected, 4),
            }
            bias = None if linear.bias is None else linear.bias.data
            local[number] = (QuantLinear.from_layer(rounded, self.options.layer, bias=bias), record)
        for number, (_, layer) in enumerate(layers):
            owner = number % self.processes.world
            if number in local:
                module, record = local[number]
                self.processes.broadcast(
                    {"state": dict(module.state_dict()), "record": record}, owner
                )
            else:
                received = self.processes.broadcast({}, owner)
                module, record = self._empty_like(linear_of(block, layer)), received["record"]
                module.load_state_dict(received["state"], assign=True)
            results[layer] = module
            records.append(record)
            self._done(record)
        return results

    def _empty_like(self, linear: nn.Linear) -> QuantLinear:
        return QuantLinear(
            linear.in_features,
            linear.out_features,
            self.options.layer,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device="meta",
        )

    def _use(self, block: nn.Module, packed: dict[str, QuantLinear]) -> None:
        """Put the dequantised weights into the block: what is packed is what later layers see."""
        for layer, module in packed.items():
            linear = linear_of(block, layer)
            linear.weight.data = module.dequantize().to(linear.weight)

    def _tensors(
        self, block: nn.Module, name: str, packed: dict[str, QuantLinear]
    ) -> dict[str, Tensor]:
        """Return a block's tensors as the checkpoint has them, under their full names."""
        tensors = {}
        for child, tensor in block.state_dict().items():
            owner = child.rpartition(".")[0]
            if owner not in packed:
                tensors[f"{name}.{child}"] = self._as_stored(f"{name}.{child}", tensor)
        for layer, module in packed.items():
            for child, tensor in module.state_dict().items():
                full = f"{name}.{layer}.{child}"
                tensors[full] = self._as_stored(full, tensor) if child == "bias" else tensor
        return tensors

    def _restore(self, block: nn.Module, name: str, part: str) -> None:
        """Put a finished block's dequantised weights in place, exactly as when it was made."""
        with safe_open(self.work.part(part), framework="pt", device=str(self.device)) as stored:
            names = set(stored.keys())
            for layer in self._layers_in(names, name):
                module = self._empty_like(linear_of(block, layer))
                state = {
                    child: stored.get_tensor(f"{name}.{layer}.{child}")
                    for child in module.state_dict()
                }
                module.load_state_dict(state, assign=True)
                self._use(block, {layer: module})
            if self.options.tune is not None:
                restore_norms(block, lambda child: stored.get_tensor(f"{name}.{child}"))

    def _layers_in(self, names: set[str], block: str) -> list[str]:
        index = int(block.rpartition(".")[2])
        return [n for n in self.layout.linears[index] if f"{block}.{n}.scales" in names]
