"""The original model over the calibration sequences, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from rlo_gptq.calibration.block_inputs import (
    Activations,
    BlockCall,
    check_same_calls,
    record_inputs,
    run_sequences,
)
from rlo_gptq.calibration.token_weights import logits_from_hidden
from rlo_gptq.models.layout import Layout
from rlo_gptq.models.source import ModelSource, release, require_filled


def first_inputs(
    source: ModelSource,
    layout: Layout,
    sequences: Tensor,
    mine: Sequence[int],
    *,
    offload: Path | None = None,
    loaded: Callable[[], None] = lambda: None,
) -> tuple[Activations, list[BlockCall]]:
    """Return the first block's inputs for some sequences, and how blocks are called.

    Args:
        source: The model; what is before its blocks is loaded, and released again.
        layout: Of its blocks.
        sequences: Token ids, (count, tokens).
        mine: The numbers of the sequences.
        offload: A folder to keep the inputs in; None for memory.
        loaded: Called when the weights outside of the blocks are in place.
    """
    model, blocks = source.model, layout.blocks
    modules = list(model.get_submodule(blocks).children())
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    unused = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    source.load(lambda name: not name.startswith(f"{blocks}.") and name not in unused)
    require_filled(model, except_for=(f"{blocks}.", *unused, *model.all_tied_weights_keys))
    loaded()
    hidden, calls = record_inputs(model, modules, sequences[0], source.device)
    activations = Activations(
        max(1, len(mine)),
        hidden.shape[1],
        hidden.shape[2],
        hidden.dtype,
        offload,
        pinned=source.device.type == "cuda",
    )
    for row, index in enumerate(mine):
        hidden, others = record_inputs(model, modules, sequences[index], source.device)
        if row < 2:  # one other sequence is enough to see a difference
            check_same_calls(calls, others, type(model).__name__)
        activations.set(row, hidden)
    release(model)
    return activations, calls


@contextmanager
def dense_outputs(
    source: ModelSource,
    layout: Layout,
    sequences: Tensor,
    mine: Sequence[int],
    *,
    offload: Path | None = None,
    note: Callable[[int, int], None],
) -> Iterator[tuple[Activations, Callable[[Tensor], Tensor]]]:
    """Run the original model; yield its last block's outputs and the function on to the logits.

    Args:
        source: The model.
        layout: Of its blocks.
        sequences: Token ids, (count, tokens).
        mine: The numbers of this process's sequences.
        offload: A folder to keep hidden states in; None for memory.
        note: Is told of every block: its number, and how many there are.
    """
    activations, calls = first_inputs(source, layout, sequences, mine, offload=offload)
    try:
        model, path = source.model, layout.blocks
        for index in range(layout.count):
            note(index, layout.count)
            block = source.load_module(layout.block_name(index))
            run_sequences(block, calls[index], activations, activations, len(mine))
            release(block)
        tied = model.all_tied_weights_keys
        source.load(lambda name: not name.startswith(f"{path}."))
        model.tie_weights()
        require_filled(model, except_for=(f"{path}.", *tied))
        with logits_from_hidden(model, list(model.get_submodule(path).children())) as logits_of:
            yield activations, logits_of
        release(model)
    finally:
        activations.close()
