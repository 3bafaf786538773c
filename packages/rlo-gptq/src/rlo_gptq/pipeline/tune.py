r"""Finetuning of a quantized block's scales, zeros and norms against its own dense output.

Codes stay as they were rounded. With x the block's inputs as the quantized model gives them,
:math:`\min \sum_x \lVert f(x) - \hat f(x)\rVert^2` by Adam over the calibration sequences, f the
block with its dense weights. A part of the sequences is held out; what is kept is the epoch with
the smallest error there, measured with scales and norms already rounded to the types they are
stored in, and that may be the beginning: a block never gets worse on them.

Source: the block-wise finetuning of AQLM (2401.06118) and QuIP# (2402.04396), without the codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlo_gptq.calibration.block_inputs import Activations, BlockCall
from rlo_gptq.packed.packing import unpack_codes
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.pipeline.processes import Processes
from rlo_gptq.rounding.grids import column_groups, symmetric_zero
from rlo_gptq.rounding.trellis import decode, trellis_of
from rlo_gptq.settings import TuneSettings

BATCH = 4
"""Sequences of an update."""

HELD_OUT = 8
"""One sequence in this many is held out, and at least one."""


class _TunedLayer:
    r"""The dense weight of a packed layer as a function of its scales and zeros.

    Scales are :math:`s e^\theta`, so that steps are relative and no sign changes; zeros move in
    steps of the grid.
    """

    def __init__(self, module: QuantLinear) -> None:
        self.module = module
        settings = module.settings
        codes = unpack_codes(module.weight, module.bits, module.in_features)
        trellis = trellis_of(settings.grid, settings.bits)
        self.codes = codes.float()
        if trellis is not None:
            self.codes = decode(codes.T, trellis).T.contiguous()
        self.group = column_groups(module.in_features, module.group_size).to(codes.device)
        self.scales = module.scales.float()
        self.zeros: Tensor | float = 0.0
        if module.zeros is not None:
            self.zeros = module.zeros.float()
        elif trellis is None:
            self.zeros = symmetric_zero(module.bits, integer=settings.integer_zero)
        # One scale for the matrix stays one.
        shape = (1, 1) if settings.group_size == 0 else tuple(self.scales.shape)
        self.log_scale = torch.zeros(shape, device=codes.device)
        self.shift = torch.zeros(shape, device=codes.device)
        self.parameters = [self.log_scale]
        if module.zeros is not None and not settings.integer_zero:
            self.parameters.append(self.shift)

    def grid(self, *, rounded: bool) -> tuple[Tensor, Tensor | float]:
        """Return scales and zeros, (m, groups), on request as they are stored."""
        scales: Tensor = self.scales * self.log_scale.exp()
        zeros = self.zeros + self.shift if isinstance(self.zeros, Tensor) else self.zeros
        if rounded:
            dtype = self.module.scales.dtype
            scales = scales.to(dtype).float()
            zeros = zeros.to(dtype).float() if isinstance(zeros, Tensor) else zeros
        return scales, zeros

    def weight(self, *, rounded: bool) -> Tensor:
        """Return the dense weight in the original basis, (m, d), differentiable."""
        scales, zeros = self.grid(rounded=rounded)
        if isinstance(zeros, Tensor):
            zeros = zeros[:, self.group]
        values = (self.codes - zeros) * scales[:, self.group]
        if self.module.transform is not None:
            values = self.module.transform.restore_weight(values)
        return values if self.module.input_scale is None else values * self.module.input_scale

    def write(self) -> None:
        """Put scales and zeros into the packed layer."""
        scales, zeros = self.grid(rounded=True)
        self.module.scales = scales.to(self.module.scales.dtype)
        if self.module.zeros is not None and isinstance(zeros, Tensor):
            self.module.zeros = zeros.to(self.module.zeros.dtype)


class _TunedNorm:
    r"""A norm's gain or bias, :math:`w + \mathrm{rms}(w)\,\theta`."""

    def __init__(self, parameter: nn.Parameter, stored: Callable[[Tensor], Tensor]) -> None:
        self.parameter, self.stored = parameter, stored
        self.start = parameter.detach().float().clone()
        rms = self.start.square().mean().sqrt()
        self.unit = torch.where(rms > 0, rms, torch.ones_like(rms))
        self.theta = torch.zeros_like(self.start)
        self.parameters = [self.theta]

    def weight(self, *, rounded: bool) -> Tensor:
        """Return the gain, on request as it is stored."""
        value: Tensor = self.start + self.unit * self.theta
        return self.stored(value).to(value.dtype) if rounded else value

    def write(self) -> None:
        """Put the gain into the block."""
        self.parameter.data = self.weight(rounded=True).to(self.parameter.dtype)


def norm_names(block: nn.Module) -> list[str]:
    """Return the names of the gains and biases of a block's norms."""
    return [
        f"{path}.{name}"
        for path, module in block.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 1
    ]


def restore_norms(block: nn.Module, stored: Callable[[str], Tensor]) -> None:
    """Put the norms of a block that was finetuned earlier in place."""
    for name in norm_names(block):
        parameter = block.get_parameter(name)
        parameter.data = stored(name).to(parameter)


@dataclass(frozen=True)
class _Data:
    """What a block maps to what, for this process's sequences.

    Args:
        block: The block; how it is `call`ed.
        inputs: Its inputs, row by row.
        targets: Its dense outputs.
        mine: The number of the sequence in each row.
        token_weights: (rows, tokens), or None for 1.
        device: Where the block is.
    """

    block: nn.Module
    call: BlockCall
    inputs: Activations
    targets: Activations
    mine: Sequence[int]
    token_weights: Tensor | None
    device: torch.device

    def error(self, row: int, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return squared error and squared target of one sequence, both summed."""

        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return functional_call(self.block, dict(tensors), (hidden, *args), kwargs)

        y = self.call.run(run, self.inputs.get(row, self.device)).float()
        target = self.targets.get(row, self.device).float()
        error, energy = (y - target).square().sum(-1), target.square().sum(-1)
        if self.token_weights is not None:
            weight = self.token_weights[row].to(self.device)
            error, energy = error * weight, energy * weight
        return error.sum(), energy.sum()


def tune_block(
    block: nn.Module,
    packed: Mapping[str, QuantLinear],
    call: BlockCall,
    inputs: Activations,
    targets: Activations,
    mine: Sequence[int],
    settings: TuneSettings,
    *,
    count: int,
    seed: int,
    stored: Callable[[str, Tensor], Tensor],
    processes: Processes,
    token_weights: Tensor | None = None,
) -> dict[str, Any]:
    """Finetune a block; its packed layers' scales and zeros and its norms are replaced.

    Args:
        block: With the weights of `packed`, dequantised, in place.
        packed: Its quantized layers, by their names in the block.
        call: How it is called.
        inputs: Its inputs for this process's sequences.
        targets: Its dense outputs for them.
        mine: The numbers of this process's sequences, of all `count`.
        settings: Epochs and learning rate.
        count: Sequences of all processes; at least 2.
        seed: Of the order in which sequences come.
        stored: Rounds the tensor of a name to the type it is stored in.
        processes: This process among its peers.
        token_weights: Shape (rows, tokens), weights of tokens in the error; None for 1.

    Returns:
        `error_before` and `error_after`, squared error over squared target on the sequences held
        out; `epoch`, the one that was kept, 0 for the beginning; `seconds`.
    """
    begin = time.perf_counter()
    tuned = _parameters(block, packed, stored)
    leaves = [leaf for part in tuned.values() for leaf in part.parameters]
    data = _Data(block, call, inputs, targets, mine, token_weights, processes.device)
    block.requires_grad_(False)
    held = range(count - max(1, count // HELD_OUT), count)
    generator = torch.Generator().manual_seed(seed)
    energy = _energy(data, range(count), processes) / count
    steps = settings.epochs * -(-held.start // BATCH)
    optimizer = torch.optim.Adam(leaves, lr=settings.learning_rate, betas=(0.9, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    before = best = _held_error(data, tuned, held, processes)
    kept, epoch_kept = [leaf.clone() for leaf in leaves], 0
    for epoch in range(1, settings.epochs + 1):
        order = torch.randperm(held.start, generator=generator).tolist()
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            _gradients(data, tuned, batch, energy * len(batch), processes)
            optimizer.step()
            schedule.step()
        error = _held_error(data, tuned, held, processes)
        if error < best:
            best, epoch_kept = error, epoch
            kept = [leaf.detach().clone() for leaf in leaves]
    with torch.no_grad():
        for leaf, value in zip(leaves, kept, strict=True):
            leaf.copy_(value)
        for part in tuned.values():
            part.write()
    return {
        "error_before": before,
        "error_after": best,
        "epoch": epoch_kept,
        "seconds": round(time.perf_counter() - begin, 4),
    }


def _parameters(
    block: nn.Module,
    packed: Mapping[str, QuantLinear],
    stored: Callable[[str, Tensor], Tensor],
) -> dict[str, _TunedLayer | _TunedNorm]:
    """Return what is tuned, by the name of the tensor in the block that it gives."""
    tuned: dict[str, _TunedLayer | _TunedNorm] = {
        f"{name}.weight": _TunedLayer(module) for name, module in packed.items()
    }
    for name in norm_names(block):
        parameter = block.get_parameter(name)
        tuned[name] = _TunedNorm(parameter, lambda value, name=name: stored(name, value))  # type: ignore[misc]
    for part in tuned.values():
        for leaf in part.parameters:
            leaf.requires_grad_(True)
    return tuned


def _tensors(
    data: _Data, tuned: Mapping[str, _TunedLayer | _TunedNorm], *, rounded: bool
) -> dict[str, Tensor]:
    return {
        name: part.weight(rounded=rounded).to(data.block.get_parameter(name).dtype)
        for name, part in tuned.items()
    }


def _rows(data: _Data, numbers: Sequence[int]) -> list[int]:
    """Return the rows of those of the sequences that this process has."""
    wanted = set(numbers)
    return [row for row, number in enumerate(data.mine) if number in wanted]


def _energy(data: _Data, numbers: Sequence[int], processes: Processes) -> float:
    total = torch.zeros(1, dtype=torch.float64)
    for row in _rows(data, numbers):
        target = data.targets.get(row, data.device).float().square().sum(-1)
        if data.token_weights is not None:
            target = target * data.token_weights[row].to(data.device)
        total += target.sum().cpu()
    processes.sum_tensors([total])
    return float(total)


@torch.no_grad()
def _held_error(
    data: _Data,
    tuned: Mapping[str, _TunedLayer | _TunedNorm],
    held: Sequence[int],
    processes: Processes,
) -> float:
    """Return squared error over squared target on the sequences held out, as stored."""
    tensors = _tensors(data, tuned, rounded=True)
    sums = torch.zeros(2, dtype=torch.float64)
    for row in _rows(data, held):
        error, energy = data.error(row, tensors)
        sums += torch.stack([error, energy]).cpu()
    processes.sum_tensors([sums])
    return float(sums[0] / sums[1].clamp(min=1e-30))


@torch.enable_grad()
def _gradients(
    data: _Data,
    tuned: Mapping[str, _TunedLayer | _TunedNorm],
    batch: Sequence[int],
    energy: float,
    processes: Processes,
) -> None:
    """Leave the gradient of the batch's error over `energy` in the parameters, in all processes.

    Dense weights are made once for the batch; each sequence adds to their gradients.
    """
    tensors = _tensors(data, tuned, rounded=False)
    inner = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    for row in _rows(data, batch):
        error, _ = data.error(row, inner)
        (error / max(energy, 1e-30)).backward()  # type: ignore[no-untyped-call]
    reached = [name for name, leaf in inner.items() if leaf.grad is not None]
    leaves = [leaf for part in tuned.values() for leaf in part.parameters]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    if reached:
        torch.autograd.backward(
            [tensors[name] for name in reached], [inner[name].grad for name in reached]
        )
    processes.sum_tensors([leaf.grad for leaf in leaves if leaf.grad is not None])
