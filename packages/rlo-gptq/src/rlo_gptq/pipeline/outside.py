"""The token embedding and the output head, rounded with the machinery of the layers.

An embedding of its own comes first, so that the blocks are calibrated on what they will see. A head
comes last: its Hessian is that of the last hidden states. A matrix that is both is rounded last,
against the mean of the head's Hessian and the identity, which is the embedding's: every row is used
as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlo_gptq.calibration.block_inputs import Activations
from rlo_gptq.calibration.hessian_sum import HessianSum
from rlo_gptq.calibration.token_weights import logits_from_hidden
from rlo_gptq.models.fold_checkpoint import FoldedHead
from rlo_gptq.models.layout import Layout
from rlo_gptq.models.outside import Outside
from rlo_gptq.models.source import ModelSource, release, require_filled
from rlo_gptq.options import Options, layer_seed
from rlo_gptq.packed.packed_weight import PackedWeight
from rlo_gptq.packed.quant_embedding import QuantEmbedding
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.packed.tied_head import TiedHead
from rlo_gptq.pipeline.processes import Processes
from rlo_gptq.pipeline.work_folder import WorkFolder
from rlo_gptq.rounding.layer import normalised, quantize_layer
from rlo_gptq.settings import LayerSettings

EMBEDDING, HEAD = "embedding", "head"
"""Parts of the work folder."""


class _StopError(Exception):
    """Ends a forward pass at the head."""


def part_names(layout: Layout, outside: Outside) -> list[str]:
    """Return the parts of a finished work folder, in the order of the checkpoint."""
    blocks = [f"block-{index:05d}" for index in range(layout.count)]
    first = [EMBEDDING] if outside.embedding in outside.quantized and not outside.tied else []
    return ["rest", *first, *blocks, *([HEAD] if outside.last is not None else [])]


def rest_names(source: ModelSource, layout: Layout, outside: Outside) -> list[str]:
    """Return the names of the tensors outside of the blocks that are stored dense."""
    left = {f"{name}.weight" for name in outside.quantized}
    left |= set(source.model.all_tied_weights_keys)
    if outside.tied and outside.head is not None:
        left.add(f"{outside.head}.weight")
    blocks = f"{layout.blocks}."
    return source.targets(lambda name: not name.startswith(blocks) and name not in left)


def empty_matrix(
    name: str, outside: Outside, model: nn.Module, settings: LayerSettings
) -> PackedWeight:
    """Return the empty packed module of an embedding or a head, on the meta device, no bias."""
    module = model.get_submodule(name)
    if name == outside.embedding:
        assert isinstance(module, nn.Embedding)
        size = (module.num_embeddings, module.embedding_dim)
        return QuantEmbedding(*size, settings, device="meta")
    assert isinstance(module, nn.Linear)
    return QuantLinear(module.in_features, module.out_features, settings, device="meta")


def fold_tensors(outside: Outside, folded: FoldedHead | None) -> dict[str, Tensor]:
    """Return the tensors of a tied head in a folded model, by their full names."""
    if outside.fold is None or folded is None:
        return {}
    return {
        f"{outside.head}.gain": folded.gain.float(),
        f"{outside.head}.seed": torch.tensor([folded.seed], dtype=torch.int64),
    }


@dataclass(frozen=True)
class OutsideQuantizer:
    """Quantizes embedding and head of one model into one folder.

    Args:
        options: What to do.
        source: The model.
        layout: Of its blocks.
        outside: How embedding and head are stored.
        folded: Of a model whose rotations are folded and whose head was tied.
        work: Where finished parts go.
        processes: This process among its peers.
        note: Is told the record of each matrix.
        token_weights: Shape (sequences, tokens), weights of calibration tokens; None for 1.
    """

    options: Options
    source: ModelSource
    layout: Layout
    outside: Outside
    folded: FoldedHead | None
    work: WorkFolder
    processes: Processes
    note: Callable[[dict[str, Any]], None]
    token_weights: Tensor | None

    def embedding_first(self) -> None:
        """Quantize an embedding of its own, or note that it was."""
        if self.outside.embedding not in self.outside.quantized or self.outside.tied:
            return
        if not self._resumed(EMBEDDING):
            if self.processes.first:
                name = self.outside.embedding
                self.source.load(lambda target: target == f"{name}.weight")
                weight = self.source.model.get_parameter(f"{name}.weight")
                self._round(EMBEDDING, name, weight, torch.eye(weight.shape[1]), tokens=0)
                release(self.source.model)
            self.processes.wait()

    def replace_embedding(self) -> None:
        """Put the dequantised embedding into the loaded skeleton, if it has one of its own."""
        name = self.outside.embedding
        if not self.work.has(EMBEDDING):
            return
        settings = self.outside.quantized[name]
        packed = empty_matrix(name, self.outside, self.source.model, settings)
        stored = self.work.tensors(EMBEDDING, self.processes.device)
        packed.load_state_dict({k: stored[f"{name}.{k}"] for k in packed.state_dict()}, assign=True)
        weight = self.source.model.get_parameter(f"{name}.weight")
        weight.data = packed.dequantize().to(weight)

    @property
    def head_waits(self) -> bool:
        """Whether the last hidden states are needed still."""
        exists = self.work.has(HEAD) if self.processes.first else False
        exists = self.processes.broadcast({"exists": exists}, 0)["exists"]
        return self.outside.last is not None and not exists

    def head_last(self, activations: Activations, mine: Sequence[int]) -> None:
        """Quantize the head, or the matrix it shares, against the last hidden states.

        Args:
            activations: The last block's outputs for this process's sequences.
            mine: The numbers of these sequences.
        """
        name = self.outside.last
        if name is None or self._resumed(HEAD):
            return
        begin = time.perf_counter()
        total = self.head_hessian(activations, mine)
        self.processes.sum_hessian(total)
        tokens = total.tokens
        if self.processes.first:
            hessian = total.mean(str(self.outside.head))
            if self.outside.tied:
                hessian = self.shared_hessian(hessian)
            collected = time.perf_counter() - begin
            self.source.load(lambda target: target == f"{name}.weight")
            weight = self.source.model.get_parameter(f"{name}.weight")
            self._round(HEAD, name, weight, hessian, tokens=tokens, calibration_seconds=collected)
            release(self.source.model)
        self.processes.wait()

    def head_hessian(self, activations: Activations, mine: Sequence[int]) -> HessianSum:
        """Return the second moment of the head's inputs, given the last block's outputs."""
        model, path, head_name = self.source.model, self.layout.blocks, self.outside.head
        assert head_name is not None
        unused = (f"{head_name}.weight", *model.all_tied_weights_keys)
        # Embeddings are run on tokens that do not matter; their rows need not be the right ones.
        self.source.load(lambda name: not name.startswith(f"{path}.") and name not in unused)
        require_filled(model, except_for=(f"{path}.", *unused))
        head = model.get_submodule(head_name)
        assert isinstance(head, nn.Linear)
        total = HessianSum(head.in_features, self.processes.device)
        current: list[Tensor | None] = [None]

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            total.add(args[0], current[0])
            raise _StopError

        handle = head.register_forward_pre_hook(hook)
        try:
            with logits_from_hidden(model, list(model.get_submodule(path).children())) as logits_of:
                for row in range(len(mine)):
                    if self.token_weights is not None:
                        current[0] = self.token_weights[row].to(self.processes.device)
                    try:
                        logits_of(activations.get(row, self.processes.device))
                    except _StopError:
                        continue
        finally:
            handle.remove()
            release(model)
        return total

    def shared_hessian(self, hessian: Tensor) -> Tensor:
        """Return the Hessian of a matrix that is head and embedding, given the head's."""
        if self.outside.fold is not None and self.folded is not None:
            width = len(hessian)
            head = TiedHead(nn.Embedding(1, width, device="meta"), fold=self.outside.fold)
            head.gain = self.folded.gain.to(hessian)
            head.seed = torch.tensor([self.folded.seed])
            hessian = head.turned(head.turned(hessian).T)
        hessian = normalised(hessian)
        hessian.diagonal().add_(1)
        return hessian.div_(2)

    def _round(
        self, part: str, name: str, weight: Tensor, hessian: Tensor, **measured: Any
    ) -> None:
        begin = time.perf_counter()
        settings = self.outside.quantized[name]
        seed = layer_seed(self.options.seed, name)
        rounded = quantize_layer(weight, hessian.to(weight.device), settings, seed=seed)
        packed = empty_matrix(name, self.outside, self.source.model, settings)
        packed.fill(rounded)
        record = {
            "layer": name,
            "outside": True,
            "rows": weight.shape[0],
            "columns": weight.shape[1],
            "bits": settings.bits,
            "proxy": rounded.proxy,
            "tokens": 0,
            "seconds": round(time.perf_counter() - begin, 4),
            "calibration_seconds": 0.0,
            **measured,
        }
        self.work.save(part, {f"{name}.{k}": v for k, v in packed.state_dict().items()}, [record])
        self.note(record)

    def _resumed(self, part: str) -> bool:
        exists = self.work.has(part) if self.processes.first else False
        exists = bool(self.processes.broadcast({"exists": exists}, 0)["exists"])
        if exists and self.processes.first:
            for record in self.work.records(part):
                self.note(record)
        return exists
