"""Calibration: token sequences, what flows into the first block, and which layers see which
input.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rlo_core.text import TextData
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlo_gptq.hessian import CalibrationError, HessianSum


def token_ids(tokenizer: PreTrainedTokenizerBase, data: TextData) -> Tensor:
    """Return the text as one row of token ids, (n,), int64.

    A running text is tokenized as one string, as the field's perplexities are; of separate
    documents each gets its own beginning-of-text token, if the tokenizer puts one.
    """
    if data.running:
        ids = tokenizer(data.joined, return_attention_mask=False, verbose=False)["input_ids"]
    else:
        pieces = tokenizer(data.documents, return_attention_mask=False, verbose=False)["input_ids"]
        ids = [token for piece in pieces for token in piece]
    return torch.tensor(ids, dtype=torch.int64)


def sample_sequences(ids: Tensor, *, count: int, length: int, seed: int) -> Tensor:
    """Return `count` spans of `length` tokens from random places, (count, length), as GPTQ draws
    them.

    Raises:
        CalibrationError: the text is shorter than one span.
    """
    if count < 1 or length < 2:
        raise CalibrationError(
            f"nsamples must be at least 1 and seqlen 2, got {count} and {length}"
        )
    if len(ids) < length:
        raise CalibrationError(
            f"calibration text must have at least {length} tokens, got {len(ids)}; "
            "give more text or a smaller --seqlen"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length + 1, (count,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


class _StopError(Exception):
    """Ends a forward pass when what was wanted of it is there."""


@dataclass
class BlockCall:
    """What a block is called with besides the hidden states: masks, positions, ..."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Return the block's output hidden states for hidden states (1, tokens, width)."""
        output = block(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    return type(left) is type(right)


class _Recorder:
    """Stands in for the forward of every block: notes what it is called with, passes it on."""

    def __init__(self, blocks: int, *, as_tuple: bool) -> None:
        self.blocks, self.as_tuple = blocks, as_tuple
        self.hidden: list[Tensor] = []
        self.calls: list[BlockCall] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden, call = _hidden_of(args, kwargs)
        self.hidden.append(hidden)
        self.calls.append(call)
        if len(self.calls) == self.blocks:
            raise _StopError
        return (hidden,) if self.as_tuple else hidden

    @property
    def whole(self) -> bool:
        """Whether every block was called, with hidden states of one shape."""
        same = all(hidden.shape == self.hidden[0].shape for hidden in self.hidden)
        return len(self.calls) == self.blocks and same


def record_inputs(
    model: PreTrainedModel, blocks: Sequence[nn.Module], sequence: Tensor, device: torch.device
) -> tuple[Tensor, list[BlockCall]]:
    """Run what comes before the blocks; return the first block's input and how each block is
    called.

    The blocks' own forward is not run, so that their weights need not be there.

    Args:
        model: With the weights outside of the blocks in place.
        blocks: The decoder blocks.
        sequence: Token ids, (tokens,).
        device: Where the model is.
    """
    for as_tuple in (False, True):  # some models take output[0] of a block
        recorder = _Recorder(len(blocks), as_tuple=as_tuple)
        with _replaced_forward(blocks, recorder):
            try:
                model(input_ids=sequence[None].to(device), use_cache=False)
            except _StopError:
                pass
            except (IndexError, TypeError, ValueError):
                if as_tuple:
                    raise
        if recorder.whole:
            return recorder.hidden[0], recorder.calls
    raise CalibrationError(
        f"model {type(model).__name__} must call its {len(blocks)} blocks one after the other"
    )


@contextmanager
def _replaced_forward(blocks: Sequence[nn.Module], forward: Any) -> Iterator[None]:
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class Activations:
    """Hidden states of all calibration sequences, in memory or in a file.

    Args:
        count: Sequences.
        length: Tokens in one.
        width: Width of a hidden state.
        dtype: Of the hidden states.
        offload: A folder for the file, or None for memory.
    """

    def __init__(
        self, count: int, length: int, width: int, dtype: torch.dtype, offload: Path | None = None
    ) -> None:
        self.shape, self.dtype = (count, length, width), dtype
        self._file = None
        if offload is None:
            self._store = torch.empty(self.shape, dtype=dtype)
            return
        offload.mkdir(parents=True, exist_ok=True)
        # No name in the file system: nothing is left behind, whatever happens.
        self._file = tempfile.TemporaryFile(dir=offload)  # noqa: SIM115 - closed with this object
        size = count * length * width
        self._file.truncate(size * dtype.itemsize)
        # Read and written, not mapped: mapped pages would count as this process's memory.

    def __len__(self) -> int:
        return self.shape[0]

    def close(self) -> None:
        """Give up the file, if there is one."""
        if self._file is not None:
            self._file.close()

    def get(self, index: int, device: torch.device) -> Tensor:
        """Return the hidden states of one sequence, (1, tokens, width)."""
        if self._file is None:
            return self._store[index : index + 1].to(device)
        _, length, width = self.shape
        size = length * width * self.dtype.itemsize
        self._file.seek(index * size)
        flat = torch.frombuffer(bytearray(self._file.read(size)), dtype=self.dtype)
        return flat.view(1, length, width).to(device)

    def set(self, index: int, hidden: Tensor) -> None:
        """Replace the hidden states of one sequence."""
        if self._file is None:
            self._store[index] = hidden[0].cpu()
            return
        raw = hidden[0].to("cpu", self.dtype).contiguous().view(torch.uint8)
        self._file.seek(index * raw.numel())
        self._file.write(raw.reshape(-1).numpy().tobytes())


def check_same_calls(left: list[BlockCall], right: list[BlockCall], model: str) -> None:
    """Refuse a model whose blocks get other inputs, besides hidden states, for other sequences.

    Raises:
        CalibrationError: names the block and the input.
    """
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        for name in a.kwargs.keys() | b.kwargs.keys():
            if not _same(a.kwargs.get(name), b.kwargs.get(name)):
                raise CalibrationError(
                    f"blocks of {model} must get the same inputs for every sequence besides hidden "
                    f"states, but block {index} gets its own {name!r}"
                )


def run_sequences(
    block: nn.Module, call: BlockCall, inputs: Activations, outputs: Activations, rows: int
) -> None:
    """Fill `outputs` with what the block makes of `inputs`, which may be the same."""
    device = next(block.parameters()).device
    for row in range(rows):
        outputs.set(row, call.run(block, inputs.get(row, device)))


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
            key = (x.data_ptr(), x._version, tuple(x.shape))
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
                raise _StopError  # the rest of the block is not needed

        return hook

    handles = [block.get_submodule(n).register_forward_pre_hook(hook_for(n)) for n in firsts]
    try:
        for index in indices:
            current[0] = None if token_weights is None else token_weights[index].to(device)
            try:
                call.run(block, activations.get(index, device))
            except _StopError:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _width(module: nn.Module) -> int:
    assert isinstance(module, nn.Linear)
    return module.in_features
