"""The packed model with its trained tensors: divergence and gradients, a block dense at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlo_gptq.calibration.block_inputs import BlockCall, check_same_calls, record_inputs
from rlo_gptq.calibration.token_weights import logits_from_hidden
from rlo_gptq.checkpoint.load import load
from rlo_gptq.checkpoint.validation import read_headers, weight_paths
from rlo_gptq.tuning.divergence import Target, divergence, logit_rows
from rlo_gptq.tuning.layers import TunedEmbedding, unpacked
from rlo_gptq.tuning.trained import trained_tensors


class Student:
    """A packed model of which everything but the codes is trained.

    Hidden states between blocks are kept for the sequences of a step; a block is run again when its
    gradients are taken, one sequence at a time, so that one block's activations for one sequence
    are all that exist.

    Args:
        folder: The checkpoint.
        blocks: Path of its decoder blocks.
        device: Where it is.
        embeddings: Train embeddings and the output layer: packed ones' scales, others whole.
        trust_remote_code: Let transformers run code from the folder.
    """

    def __init__(
        self,
        folder: Path,
        blocks: str,
        device: torch.device,
        *,
        embeddings: bool,
        trust_remote_code: bool = False,
    ) -> None:
        self.device = device
        self.model = load(
            folder,
            dtype=torch.float32,
            device_map={"": device},
            trust_remote_code=trust_remote_code,
        )
        self.model.eval()  # type: ignore[no-untyped-call]
        self.model.requires_grad_(False)
        self.blocks = list(self.model.get_submodule(blocks).children())
        stored = read_headers(weight_paths(folder))
        self.trained = trained_tensors(self.model, stored, embeddings=embeddings)
        # Without gradients before the blocks, the way back ends at the first of them.
        self._to_the_start = any(
            parameter.requires_grad
            for module in self.model.modules()
            if isinstance(module, (nn.Embedding, TunedEmbedding))
            for parameter in module.parameters()
        )
        self.calls: list[BlockCall] | None = None

    def _start(self, ids: Tensor) -> Tensor:
        """Return the first block's input; notes how blocks are called."""
        hidden, calls = record_inputs(self.model, self.blocks, ids, self.device)
        if self.calls is None:
            self.calls = calls
        return hidden

    @torch.no_grad()
    def _forward(self, sequences: Sequence[Tensor], *, keep: bool) -> list[list[Tensor]]:
        """Return the inputs of every block, and last its outputs; only these unless `keep`."""
        first = self.calls is None
        states = [[self._start(ids) for ids in sequences]]
        if first and len(sequences) > 1:
            _, others = record_inputs(self.model, self.blocks, sequences[1], self.device)
            check_same_calls(self._calls, others, type(self.model).__name__)
        for block, call in zip(self.blocks, self._calls, strict=True):
            with unpacked(block):
                outputs = [call.run(block, hidden) for hidden in states[-1]]
            states = [*states, outputs] if keep else [outputs]
        return states

    @property
    def _calls(self) -> list[BlockCall]:
        assert self.calls is not None
        return self.calls

    @torch.no_grad()
    def divergence(self, sequences: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
        """Return the summed KL divergence of each sequence's tokens, (sequences,), float64."""
        sums = torch.zeros(len(sequences), dtype=torch.float64)
        if not sequences:
            return sums
        outputs = self._forward(sequences, keep=False)[-1]
        with logits_from_hidden(self.model, self.blocks) as logits_of:
            for row, (hidden, target) in enumerate(zip(outputs, targets, strict=True)):
                for part in self._parts(hidden):
                    kl = divergence(logits_of(hidden[:, part])[0], target.rows(part))
                    sums[row] += kl.double().sum().cpu()
        return sums

    def gradients(
        self,
        sequences: Sequence[Tensor],
        targets: Sequence[Target],
        weights: Sequence[Tensor],
    ) -> Tensor:
        """Add the gradient of the weighted KL divergence to the trained tensors; return its sum.

        Args:
            sequences: Token ids, each (tokens,).
            targets: Of each.
            weights: Of each sequence's tokens, (tokens,); with all that divides the sum.
        """
        total = torch.zeros((), dtype=torch.float64)
        if not sequences:
            return total
        states = self._forward(sequences, keep=True)
        with logits_from_hidden(self.model, self.blocks) as logits_of:
            ways = [
                self._through_head(logits_of, hidden, target, weight, total)
                for hidden, target, weight in zip(states.pop(), targets, weights, strict=True)
            ]
        for number in reversed(range(len(self.blocks))):
            inputs = states.pop()
            block, call = self.blocks[number], self._calls[number]
            needed = number > 0 or self._to_the_start
            with unpacked(block), torch.enable_grad():
                for row, hidden in enumerate(inputs):
                    leaf = hidden.requires_grad_(needed)
                    output = call.run(block, leaf)
                    if output.requires_grad:
                        torch.autograd.backward(output, ways[row])
                    if leaf.grad is not None:
                        ways[row] = leaf.grad
        if self._to_the_start:
            with torch.enable_grad():
                for ids, way in zip(sequences, ways, strict=True):
                    torch.autograd.backward(self._start(ids), way)
        return total

    def _parts(self, hidden: Tensor) -> list[slice]:
        """Return the tokens of a sequence in parts whose logits may exist at one time."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        step = logit_rows(vocabulary)
        return [slice(at, at + step) for at in range(0, hidden.shape[1], step)]

    def _through_head(
        self, logits_of: Any, hidden: Tensor, target: Target, weight: Tensor, total: Tensor
    ) -> Tensor:
        """Return the gradient at one sequence's last hidden states; some tokens' logits exist."""
        way = torch.empty_like(hidden)
        for part in self._parts(hidden):
            with torch.enable_grad():
                leaf = hidden[:, part].detach().requires_grad_()
                kl = divergence(logits_of(leaf)[0], target.rows(part))
                loss = (kl * weight[part]).sum()
                loss.backward()  # type: ignore[no-untyped-call]
            if leaf.grad is not None:
                way[:, part] = leaf.grad
            total += loss.detach().double().cpu()
        return way
