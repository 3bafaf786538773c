"""Mixture-of-experts layers whose experts are one 3-D weight, as lists of ordinary linear layers.

transformers keeps the experts of a layer in two tensors, (experts, 2 * inner, width) and
(experts, width, inner). A quantizer needs to see what each expert's matrices are applied to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One gated feed-forward expert: `down(act(gate) * up)`, gate and up in one matrix."""

    def __init__(self, width: int, inner: int, *, bias: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(inner, width, bias=bias, device=device, dtype=dtype)


class SplitExperts(nn.ModuleList):
    """A list of experts with the call of the fused module: hidden states, chosen experts, their
    weights.
    """

    def __init__(self, experts: list[Expert], fused: nn.Module) -> None:
        super().__init__(experts)
        self.num_experts = len(experts)
        # The fused class knows its activation and how gate and up are joined.
        self.act_fn = fused.act_fn
        self._gate: Callable[[nn.Module, Tensor], Tensor] = vars(type(fused))["_apply_gate"]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: Shape (tokens, width).
            top_k_index: Shape (tokens, k), int64; `num_experts` stands for no expert.
            top_k_weights: Shape (tokens, k).
        """
        total = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index >= self.num_experts:
                continue
            token, position = torch.where(top_k_index == index)
            expert = self[index]
            inner = self._gate(self, expert.gate_up(hidden_states[token]))
            y = expert.down(inner) * top_k_weights[token, position, None]
            total.index_add_(0, token, y.to(total.dtype))
        return total


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in the layout that `split_experts` knows."""
    gate_up = getattr(module, "gate_up_proj", None)
    down = getattr(module, "down_proj", None)
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter)):
        return False
    if gate_up.ndim != 3 or down.ndim != 3 or not hasattr(type(module), "_apply_gate"):
        return False
    if getattr(module, "is_transposed", False) or not hasattr(module, "act_fn"):
        return False
    known = {"gate_up_proj", "down_proj"}
    if {name for name, _ in module.named_parameters(recurse=False)} != known:
        return False
    experts, twice, width = gate_up.shape
    return tuple(down.shape) == (experts, width, twice // 2)


def split_experts(fused: nn.Module) -> SplitExperts:
    """Return the experts of a fused module as a list of linear layers with the same weights."""
    gate_up, down = fused.gate_up_proj, fused.down_proj
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    experts = []
    for index in range(gate_up.shape[0]):
        expert = Expert(
            gate_up.shape[2], down.shape[2], bias=False, device="meta", dtype=gate_up.dtype
        )
        expert.gate_up.weight = nn.Parameter(gate_up[index], requires_grad=False)
        expert.down.weight = nn.Parameter(down[index], requires_grad=False)
        experts.append(expert)
    return SplitExperts(experts, fused)
