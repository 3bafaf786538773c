r"""Structured random rotations, stored as a seed: :math:`W' = U W V^T`, :math:`H' = V H V^T`.

A rotation spreads outliers over all coordinates, so that every weight fits the same small grid. It
is never a dense matrix here: it is applied as permutations, signs and a few small products, and is
rebuilt anywhere from `(kind, n, seed)` by a counter-based generator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlo_gptq.rounding.random_streams import random_orthogonal, random_permutation, random_signs
from rlo_gptq.settings import Incoherence, Sides

# Odd parts of a width up to this are rotated by one dense orthogonal matrix of that size (n * q
# products a row, 43 for 11008); above it two overlapping power-of-two windows do, at n log n.
LARGEST_DENSE_FACTOR = 512
# A Hadamard transform is done as products by factors of this size: fewer passes over memory than
# butterflies of 2, and each is a matrix product.
HADAMARD_FACTOR = 64

_ROTATE_ROWS = 256  # rows of a matrix that are rotated at one time where it is changed in place

_INPUT_STREAM, _OUTPUT_STREAM = 1, 2


def hadamard_matrix(n: int) -> Tensor:
    """Return the Sylvester Hadamard matrix of order n, a power of two, orthonormal, float64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.kron(h, step)
    return h / math.sqrt(n)


def balanced_factors(n: int) -> tuple[int, int]:
    """Return QuIP's p, q with p * q = n: sorted prime factors dealt in turn, 11008 = 688 * 16."""
    primes, rest, divisor = [], n, 2
    while divisor * divisor <= rest:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1
    if rest > 1:
        primes.append(rest)
    return math.prod(primes[0::2]), math.prod(primes[1::2])


@dataclass(frozen=True)
class _Permute:
    order: Tensor  # y[i] = x[order[i]]


@dataclass(frozen=True)
class _Signs:
    signs: Tensor  # (n,)


@dataclass(frozen=True)
class _Blocks:
    """Multiply axis 1 of x viewed as (before, size, after) by a matrix, or by one for each slice.

    `matrix` is (1, size, size), or (before * after, size, size) with one block per slice.
    """

    before: int
    size: int
    after: int
    matrix: Tensor
    start: int = 0  # the window of coordinates it acts on


_Step = _Permute | _Signs | _Blocks


@dataclass
class Rotation:
    """One orthogonal n x n map, applied to the last axis of a tensor in structured form.

    Args:
        kind: `none`, `hadamard` or `kronecker`.
        n: width, any positive integer.
        seed: of the generator.
        stream: of the generator; a multiple of 16 keeps the streams of two rotations apart.
        variant: of `kronecker`: 0 blocked with permutations, 1 not blocked, 2 no permutations.
    """

    kind: Incoherence
    n: int
    seed: int
    stream: int = 0
    variant: int = 0
    _cache: dict[tuple[torch.device, torch.dtype], list[_Step]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def apply(self, x: Tensor) -> Tensor:
        """Return V x for every vector x along the last axis; same shape and dtype."""
        return self._run(x, inverse=False)

    def apply_T(self, x: Tensor) -> Tensor:  # noqa: N802
        """Return V^T x, which undoes `apply`; same shape and dtype."""
        return self._run(x, inverse=True)

    def _run(self, x: Tensor, *, inverse: bool) -> Tensor:
        if x.shape[-1] != self.n:
            raise ValueError(f"the last axis must have {self.n} elements, got {x.shape[-1]}")
        if self.kind == "none":
            return x
        shape = x.shape
        flat = x.reshape(-1, self.n)
        steps = self.steps(x.device, x.dtype)
        for step in reversed(steps) if inverse else steps:
            flat = _apply_step(step, flat, inverse=inverse)
        return flat.reshape(shape)

    def steps(self, device: torch.device, dtype: torch.dtype) -> list[_Step]:
        """Return the steps, with their tensors on `device` in `dtype`; kept for the next call."""
        key = (device, dtype)
        if key not in self._cache:
            # Tensors made in inference mode could not be used for training afterwards.
            with torch.inference_mode(False):
                plan = _plan(self.kind, self.n, self.seed, self.stream, self.variant)
                self._cache[key] = [_move(step, device, dtype) for step in plan]
        return self._cache[key]


def _apply_step(step: _Step, x: Tensor, *, inverse: bool) -> Tensor:
    if isinstance(step, _Signs):
        return x * step.signs
    if isinstance(step, _Permute):
        if not inverse:
            return x[:, step.order]
        y = torch.empty_like(x)
        y[:, step.order] = x
        return y
    width = step.before * step.size * step.after
    if width != x.shape[1]:
        inside = x[:, step.start : step.start + width]
        y = x.clone()
        y[:, step.start : step.start + width] = _multiply(step, inside, inverse=inverse)
        return y
    return _multiply(step, x, inverse=inverse)


def _multiply(step: _Blocks, x: Tensor, *, inverse: bool) -> Tensor:
    rows = x.shape[0]
    matrix = step.matrix.mT if inverse else step.matrix
    if matrix.shape[0] == 1:
        square = matrix[0]
        if step.after == 1:
            return (x.reshape(-1, step.size) @ square.T).reshape(rows, -1)
        return (square @ x.reshape(-1, step.size, step.after)).reshape(rows, -1)
    # One matrix for each of the before * after slices: (slices, size, size) @ (slices, size, rows).
    sliced = x.reshape(rows, step.before, step.size, step.after).permute(1, 3, 2, 0)
    rotated = matrix @ sliced.reshape(-1, step.size, rows)
    back = rotated.reshape(step.before, step.after, step.size, rows).permute(3, 0, 2, 1)
    return back.reshape(rows, -1)


def _move(step: _Step, device: torch.device, dtype: torch.dtype) -> _Step:
    if isinstance(step, _Permute):
        return _Permute(step.order.to(device, non_blocking=True))
    if isinstance(step, _Signs):
        return _Signs(step.signs.to(device, dtype, non_blocking=True))
    matrix = step.matrix.to(dtype).to(device, non_blocking=True)
    return _Blocks(step.before, step.size, step.after, matrix, step.start)


@functools.lru_cache(maxsize=8)
def _plan(kind: Incoherence, n: int, seed: int, stream: int, variant: int) -> list[_Step]:
    if kind == "hadamard":
        return _hadamard_plan(n, seed, stream)
    return _kronecker_plan(n, seed, stream, variant)


def _hadamard_plan(n: int, seed: int, stream: int) -> list[_Step]:
    """Signs, then H (2^a) times a small orthogonal (q) for n = 2^a q with q odd."""
    power = n & -n
    odd = n // power
    steps: list[_Step] = []
    if odd <= LARGEST_DENSE_FACTOR:
        steps.append(_Signs(random_signs(seed, stream, n)))
        if odd > 1:
            matrix = random_orthogonal(seed, stream + 1, 1, odd)
            steps.append(_Blocks(1, odd, power, matrix))
        return steps + _hadamard_steps(odd, power, 0)
    window = 1 << (n.bit_length() - 1)
    # The two windows cover every coordinate; a second round after a permutation mixes across them.
    # Signs go before each, or a second Hadamard transform would undo most of the first.
    for i, start in enumerate((0, n - window, 0, n - window)):
        if i == 2:
            steps.append(_Permute(random_permutation(seed, stream + 2, n)))
        steps.append(_Signs(random_signs(seed, stream + 3 + i, n)))
        steps += _hadamard_steps(1, window, start)
    return steps


def _hadamard_steps(outer: int, power: int, start: int) -> list[_Step]:
    steps: list[_Step] = []
    before, rest = outer, power
    while rest > 1:
        size = min(rest, HADAMARD_FACTOR)
        rest //= size
        steps.append(_Blocks(before, size, rest, hadamard_matrix(size)[None], start))
        before *= size
    return steps


def _kronecker_plan(n: int, seed: int, stream: int, variant: int) -> list[_Step]:
    """Permutation, two factors p * q = n, permutation; blocked unless `variant` is 1."""
    steps: list[_Step] = []
    if variant != 2:
        steps.append(_Permute(random_permutation(seed, stream, n)))
    before = 1
    for i, size in enumerate(balanced_factors(n)):
        if size > 1:
            blocks = 1 if variant == 1 else n // size
            matrix = random_orthogonal(seed, stream + 1 + i, blocks, size)
            steps.append(_Blocks(before, size, n // (before * size), matrix))
        before *= size
    if variant != 2:
        steps.append(_Permute(random_permutation(seed, stream + 3, n)))
    return steps


@dataclass
class Transform:
    r"""The rotations of one layer: V of its inputs and, with sides `both`, U of its outputs.

    For the weight matrix :math:`W' = U W V^T`, so :math:`W x = U^T W' (V x)`. It is a few numbers;
    the plan is rebuilt from the seed where it is needed.

    Args:
        kind: `none`, `hadamard` or `kronecker`.
        sides: `in` or `both`.
        seed: of the generator.
        in_features: d.
        out_features: m.
        variant: of `kronecker`, see `Rotation`.
    """

    kind: Incoherence
    sides: Sides
    seed: int
    in_features: int
    out_features: int
    variant: int = 0

    def __post_init__(self) -> None:
        u_kind: Incoherence = self.kind if self.sides == "both" else "none"
        stream_in, stream_out = 16 * _INPUT_STREAM, 16 * _OUTPUT_STREAM
        self.input = Rotation(self.kind, self.in_features, self.seed, stream_in, self.variant)
        self.output = Rotation(u_kind, self.out_features, self.seed, stream_out, self.variant)

    def apply_input(self, x: Tensor) -> Tensor:
        """Return V x along the last axis, of size `in_features`."""
        return self.input.apply(x)

    def apply_input_T(self, x: Tensor) -> Tensor:  # noqa: N802
        """Return V^T x along the last axis, of size `in_features`."""
        return self.input.apply_T(x)

    def apply_output(self, y: Tensor) -> Tensor:
        """Return U y along the last axis, of size `out_features`."""
        return self.output.apply(y)

    def apply_output_T(self, y: Tensor) -> Tensor:  # noqa: N802
        """Return U^T y along the last axis, of size `out_features`."""
        return self.output.apply_T(y)

    def rotate_weight(self, weight: Tensor) -> Tensor:
        """Return U W V^T of a weight (m, d)."""
        return self._on_columns(self.output.apply, self.apply_input(weight))

    def restore_weight(self, weight: Tensor) -> Tensor:
        """Return U^T W' V of a rotated weight (m, d)."""
        return self._on_columns(self.output.apply_T, self.apply_input_T(weight))

    def rotate_hessian(self, hessian: Tensor) -> Tensor:
        """Return V H V^T of a Hessian (d, d)."""
        return self.rotate_hessian_(hessian.clone())

    def rotate_hessian_(self, hessian: Tensor) -> Tensor:
        """Put V H V^T in the place of a Hessian (d, d), strip by strip; return it."""
        if self.input.kind == "none":
            return hessian
        size = _ROTATE_ROWS * (8 if hessian.is_cuda else 1)
        strips = [slice(at, at + size) for at in range(0, len(hessian), size)]
        for strip in strips:
            hessian[strip] = self.apply_input(hessian[strip])
        for strip in strips:
            hessian[:, strip] = self.apply_input(hessian[:, strip].T).T
        return hessian

    def _on_columns(self, rotate: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
        return weight if self.output.kind == "none" else rotate(weight.T).T
