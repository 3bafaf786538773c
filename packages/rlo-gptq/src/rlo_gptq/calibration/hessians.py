"""Which layers of a block read the same input, and the second moment of each such input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlo_gptq._compat import writes_to
from rlo_gptq.calibration.block_inputs import Activations, BlockCall, StopForwardError
from rlo_gptq.calibration.hessian_sum import HessianSum


def input_groups(
    block: nn.Module, linears: Sequence[str], call: BlockCall, hidden: Tensor
) -> list[list[str]]:
    """Return the layers of a block in the order they run, those with the same input together.

    q, k and v read one tensor, and gate and up another: each needs one Hessian. Layers that one
    pass does not reach (experts that no token chose) come last, each alone.
    """
    seen: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
    alive: list[Tensor] = []  # keeps the inputs, so that no address is used twice

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            alive.append(x)
            key = (x.data_ptr(), writes_to(x), tuple(x.shape))
            seen.setdefault(key, []).append(name)

        return hook

    handles = [block.get_submodule(n).register_forward_pre_hook(note(n)) for n in linears]
    try:
        call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    groups = list(seen.values())
    reached = {name for group in groups for name in group}
    return groups + [[name] for name in linears if name not in reached]


def collect_hessians(
    block: nn.Module,
    firsts: Sequence[str],
    call: BlockCall,
    activations: Activations,
    indices: Sequence[int],
    device: torch.device,
    *,
    token_weights: Tensor | None = None,
) -> dict[str, HessianSum]:
    """Run the sequences through a block and sum the second moments of the named layers' inputs.

    Args:
        block: With its weights.
        firsts: Names of layers inside the block, one for each group of layers with the same input.
        call: How the block is called.
        activations: The block's inputs.
        indices: Which sequences.
        device: Where the block is.
        token_weights: Shape (sequences, tokens), weights of the tokens; None for 1. A layer that
            sees only some of the tokens (an expert) is not weighted.

    Returns:
        For each name its sum.
    """
    sums = {name: HessianSum(_width(block.get_submodule(name)), device) for name in firsts}
    current: list[Tensor | None] = [None]

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            weight = current[0]
            if weight is not None and weight.numel() != x.numel() // x.shape[-1]:
                weight = None
            sums[name].add(x, weight)
            if len(firsts) == 1:
                raise StopForwardError  # the rest of the block is not needed

        return hook

    handles = [block.get_submodule(n).register_forward_pre_hook(hook_for(n)) for n in firsts]
    try:
        for index in indices:
            current[0] = None if token_weights is None else token_weights[index].to(device)
            try:
                call.run(block, activations.get(index, device))
            except StopForwardError:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _width(module: nn.Module) -> int:
    assert isinstance(module, nn.Linear)
    return module.in_features
