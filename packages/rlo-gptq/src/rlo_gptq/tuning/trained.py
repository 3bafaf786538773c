"""What of a packed model is trained: grids of packed matrices, norms, biases, embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rlo_gptq.tuning.layers import stand_in
from rlo_gptq.tuning.parameters import StoredParameter

WIDE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def trained_tensors(
    model: Any, stored: Mapping[str, tuple[tuple[int, ...], str]] | None, *, embeddings: bool
) -> list[StoredParameter]:
    """Make a packed model one that is trained, in place; return what of it is.

    Args:
        model: Packed, in float32; without weights, on the meta device, to know its sizes.
        stored: Shape and type of the checkpoint's tensors by name; None for all in float32.
        embeddings: Train embeddings and the output layer: packed ones' scales, others whole.
    """
    return _plain(model, stored, embeddings=embeddings) + stand_in(model, outside=embeddings)


def _plain(
    model: Any, stored: Mapping[str, tuple[tuple[int, ...], str]] | None, *, embeddings: bool
) -> list[StoredParameter]:
    """Return what is trained outside of packed matrices."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    wide = {id(module.weight) for module in tables}
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        wide.add(id(head.weight))
    tied = set(model.all_tied_weights_keys)  # not one tensor yet in a model without weights
    found = []
    for name, parameter in model.named_parameters():  # tied ones come once
        if stored is None:
            kind = "" if name in tied else "F32"
        else:
            shape, kind = stored.get(name, ((), ""))
            kind = kind if shape == tuple(parameter.shape) else ""
        if kind in WIDE and (parameter.ndim == 1 or (embeddings and id(parameter) in wide)):
            found.append(StoredParameter(name, parameter, WIDE[kind]))
    return found
