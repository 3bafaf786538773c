"""One decoder block: calibrated, rounded, tuned and written; or put back as it was written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from rlo_core.errors import RLOError
from safetensors import safe_open
from torch import Tensor, nn

from rlo_gptq.calibration.block_inputs import Activations, BlockCall, run_sequences
from rlo_gptq.calibration.hessians import collect_hessians, input_groups
from rlo_gptq.calibration.passes import linear_of, stages
from rlo_gptq.models.layout import Layout
from rlo_gptq.models.source import ModelSource
from rlo_gptq.options import Options, layer_seed
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.pipeline.processes import Processes
from rlo_gptq.pipeline.tune import restore_norms, tune_block
from rlo_gptq.pipeline.work_folder import WorkFolder
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.settings import LayerSettings


class LayerError(RLOError):
    """A layer that cannot be quantized."""


class PackedLinear(Protocol):
    """A layer as it is written: ours, or one of another format."""

    def dequantize(self) -> Tensor:
        """Return the dense weight, (out, in)."""

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors that are written."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take such tensors."""


@dataclass(frozen=True)
class BlockQuantizer:
    """Quantizes the blocks of one model into one folder.

    Args:
        options: What to do.
        source: The model.
        layout: Of its blocks.
        work: Where finished blocks go.
        processes: This process among its peers.
        note: Is told the record of each layer, and of each tuned block.
        token_weights: Shape (sequences, tokens), weights of calibration tokens; None for 1.
    """

    options: Options
    source: ModelSource
    layout: Layout
    work: WorkFolder
    processes: Processes
    note: Callable[[dict[str, Any]], None]
    token_weights: Tensor | None

    def quantize(
        self,
        block: nn.Module,
        index: int,
        part: str,
        call: BlockCall,
        activations: Activations,
        mine: Sequence[int],
    ) -> None:
        """Quantize a block's layers, write it, and leave its dequantised weights in place.

        Args:
            block: With its dense weights.
            index: Its number.
            part: The name of its file.
            call: How it is called.
            activations: Its inputs for this process's sequences.
            mine: The numbers of these sequences.

        Raises:
            RLOError: a layer cannot be quantized.
        """
        linears = self.layout.linears[index]
        name = self.layout.block_name(index)
        packed: dict[str, PackedLinear] = {}
        records: list[dict[str, Any]] = []
        groups: list[list[str]] = []
        tune = self.options.tune is not None and bool(linears)
        targets = self._like(activations) if tune else None
        if targets is not None:
            run_sequences(block, call, activations, targets, len(mine))
        if linears:
            groups = input_groups(block, linears, call, activations.get(0, self.processes.device))
            # Each process traces its own sequence, and experts are reached by some only.
            groups = self.processes.broadcast({"groups": groups}, 0)["groups"]
        for stage in stages(block, groups):
            begin = time.perf_counter()
            firsts = [group[0] for group in stage]
            sums = collect_hessians(
                block,
                firsts,
                call,
                activations,
                range(len(mine)),
                self.processes.device,
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
            self.work.save(part, block_tensors(self.source, block, name, packed), records)
        self.processes.wait()

    def restore(self, block: nn.Module, index: int, part: str) -> None:
        """Put a finished block's dequantised weights in place, exactly as when it was made."""
        name, device = self.layout.block_name(index), str(self.processes.device)
        with safe_open(self.work.part(part), framework="pt", device=device) as stored:
            for layer in self.layout.linears[index]:
                module = self._empty_like(linear_of(block, layer), f"{name}.{layer}")
                state = {
                    child: stored.get_tensor(f"{name}.{layer}.{child}")
                    for child in module.state_dict()
                }
                module.load_state_dict(state, assign=True)
                self._use(block, {layer: module})
            if self.options.tune is not None:
                restore_norms(block, lambda child: stored.get_tensor(f"{name}.{child}"))

    def _like(self, activations: Activations) -> Activations:
        """Return room for hidden states of the same sequences, kept in the same way."""
        folder = self.work.folder if self.options.offload else None
        return Activations(*activations.shape, activations.dtype, folder, pinned=activations.pinned)

    def _tune(
        self,
        block: nn.Module,
        name: str,
        packed: dict[str, PackedLinear],
        call: BlockCall,
        activations: Activations,
        targets: Activations,
        mine: Sequence[int],
    ) -> dict[str, Any]:
        """Finetune scales and norms, and put them in place; returns the block's record."""
        assert self.options.tune is not None
        measured = tune_block(
            block,
            cast("dict[str, QuantLinear]", packed),
            call,
            activations,
            targets,
            mine,
            self.options.tune,
            count=self.options.nsamples,
            seed=layer_seed(self.options.seed, f"{name}.tune"),
            stored=lambda child, tensor: self.source.as_stored(f"{name}.{child}", tensor),
            processes=self.processes,
            token_weights=self.token_weights,
        )
        self._use(block, packed)
        record = {"block": name, **measured}
        self.note(record)
        return record

    def _round_stage(
        self,
        block: nn.Module,
        name: str,
        stage: Sequence[Sequence[str]],
        sums: dict[str, Any],
        collected: float,
        records: list[dict[str, Any]],
    ) -> dict[str, PackedLinear]:
        """Round the layers of a stage; the processes share them, and all get all results."""
        results: dict[str, PackedLinear] = {}
        layers = [(group[0], layer) for group in stage for layer in group]
        owned = set(self.processes.share(len(layers)))
        local: dict[int, tuple[PackedLinear, dict[str, Any]]] = {}
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
                packed, measured = self._packed(linear, f"{name}.{layer}", hessian, seed)
            except ValueError as error:
                raise LayerError(f"layer '{name}.{layer}': {error}") from error
            record = {
                "layer": f"{name}.{layer}",
                "rows": linear.out_features,
                "columns": linear.in_features,
                **measured,
                "tokens": tokens[first],
                "seconds": round(time.perf_counter() - begin, 4),
                "calibration_seconds": round(collected, 4),
            }
            local[number] = (packed, record)
        for number, (_, layer) in enumerate(layers):
            owner = number % self.processes.world
            if number in local:
                module, record = local[number]
                self.processes.broadcast(
                    {"state": dict(module.state_dict()), "record": record}, owner
                )
            else:
                received = self.processes.broadcast({}, owner)
                module = self._empty_like(linear_of(block, layer), f"{name}.{layer}")
                record = received["record"]
                module.load_state_dict(received["state"], assign=True)
            results[layer] = module
            records.append(record)
            self.note(record)
        return results

    def _packed(
        self, linear: nn.Linear, name: str, hessian: Tensor, seed: int
    ) -> tuple[PackedLinear, dict[str, Any]]:
        """Round one layer; return it packed, and its bits and proxy loss."""
        settings = self.layout.settings(name, self.options.layer)
        rounded = quantize_layer(linear.weight, hessian, settings, seed=seed)
        bias = None if linear.bias is None else linear.bias.data
        measured = {"bits": settings.bits, "proxy": rounded.proxy}
        return QuantLinear.from_layer(rounded, settings, bias=bias), measured

    def _empty_like(self, linear: nn.Linear, name: str) -> PackedLinear:
        return empty_like(linear, self.layout.settings(name, self.options.layer))

    def _use(self, block: nn.Module, packed: dict[str, PackedLinear]) -> None:
        """Put the dequantised weights into the block: what is packed is what later layers see."""
        for layer, module in packed.items():
            linear = linear_of(block, layer)
            linear.weight.data = module.dequantize().to(linear.weight)


def empty_like(linear: nn.Linear, settings: LayerSettings) -> QuantLinear:
    """Return an empty packed layer of the size of `linear`, on the meta device."""
    return QuantLinear(
        linear.in_features,
        linear.out_features,
        settings,
        bias=linear.bias is not None,
        dtype=linear.weight.dtype,
        device="meta",
    )


def block_tensors(
    source: ModelSource, block: nn.Module, name: str, packed: Mapping[str, PackedLinear]
) -> dict[str, Tensor]:
    """Return a block's tensors as the checkpoint has them, under their full names.

    Args:
        source: Says in which types dense tensors are stored.
        block: The block; tensors on the meta device are enough to see shapes and types.
        name: Its full name.
        packed: Its packed layers, by their names inside the block.
    """
    tensors = {}
    for child, tensor in block.state_dict().items():
        owner = child.rpartition(".")[0]
        if owner not in packed:
            tensors[f"{name}.{child}"] = source.as_stored(f"{name}.{child}", tensor)
    for layer, module in packed.items():
        for child, tensor in module.state_dict().items():
            full = f"{name}.{layer}.{child}"
            tensors[full] = source.as_stored(full, tensor) if child == "bias" else tensor
    return tensors
