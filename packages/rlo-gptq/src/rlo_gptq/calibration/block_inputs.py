"""What flows into the decoder blocks: how each is called, and the hidden states of all
sequences.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlo_gptq.calibration.hessian_sum import CalibrationError


class StopForwardError(Exception):
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
            raise StopForwardError
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
            except StopForwardError:
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
        pinned: Keep memory's pages in place, so that a GPU copies while the host goes on. All
            copies of a store are then in the order of the current stream.
    """

    def __init__(
        self,
        count: int,
        length: int,
        width: int,
        dtype: torch.dtype,
        offload: Path | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        self.shape, self.dtype = (count, length, width), dtype
        self.pinned = pinned and offload is None
        self._file = None
        if offload is None:
            self._store = torch.empty(self.shape, dtype=dtype, pin_memory=self.pinned)
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
            if self.pinned and device.type == "cpu":
                torch.cuda.synchronize()  # what is still on its way here
            return self._store[index : index + 1].to(device, non_blocking=self.pinned)
        _, length, width = self.shape
        size = length * width * self.dtype.itemsize
        self._file.seek(index * size)
        flat = torch.frombuffer(bytearray(self._file.read(size)), dtype=self.dtype)
        return flat.view(1, length, width).to(device)

    def set(self, index: int, hidden: Tensor) -> None:
        """Replace the hidden states of one sequence."""
        if self._file is None:
            self._store[index].copy_(hidden[0], non_blocking=self.pinned)
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
