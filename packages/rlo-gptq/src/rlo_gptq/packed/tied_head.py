r"""An output head that has no matrix of its own and reads the embedding's.

Where rotations were folded into the model, embedding and head are no longer one matrix: with E the
original one, g the gain of the final norm and Q the rotation of the residual stream, the embedding
is :math:`E Q^T` and the head :math:`E \operatorname{diag}(g) Q^T`. But

.. math:: E \operatorname{diag}(g) Q^T x = (E Q^T) \; Q \operatorname{diag}(g) Q^T x,

and :math:`Q` costs next to nothing to apply, so that one stored matrix is still enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlo_gptq.packed.packed_weight import PackedWeight
from rlo_gptq.rounding.residual_rotation import ResidualRotation, residual_rotation


class TiedHead(nn.Linear):
    r"""Logits from the embedding's matrix; with `fold` of :math:`Q \operatorname{diag}(g) Q^T x`.

    Args:
        embedding: Whose matrix is read, packed or not; it is no submodule of this one.
        fold: Kind of the folded rotation, `hadamard` or `mean`, or None. Adds the buffers `gain`
            (width,), float32, and `seed` (1,), int64.
        bias: Whether there is a bias.
        dtype: Of the bias.
        device: Where the tensors are made.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        *,
        fold: str | None = None,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # there is no weight to be made
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings
        self.fold = fold
        # In a tuple: a module's attribute that is a module would be a submodule.
        self._of = (embedding,)
        gain = None if fold is None else torch.ones(self.in_features, device=device)
        seed = None if fold is None else torch.zeros(1, dtype=torch.int64, device=device)
        self.register_buffer("gain", gain)
        self.register_buffer("seed", seed)
        empty = torch.zeros(self.out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, False))
        self._rotation: ResidualRotation | None = None
        self._is_hf_initialized = True

    gain: Tensor | None
    seed: Tensor | None

    @property
    def embedding(self) -> nn.Embedding:
        """The embedding whose matrix is read."""
        return self._of[0]

    @property
    def weight(self) -> Any:
        """The embedding's weight, packed or not: they are tied."""
        return self.embedding.weight

    @weight.setter
    def weight(self, value: Any) -> None:
        """Do nothing: transformers ties weights by setting what is the same already."""

    def reset_parameters(self) -> None:
        """Do nothing: there are no weights to draw at random."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._rotation = None  # another seed
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> TiedHead:
        """Move like any module, but keep the gain in float32."""
        gain = self.gain
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if gain is not None and self.gain is not None and self.gain.dtype != gain.dtype:
            self.gain = gain.to(self.gain.device)
        return self

    def turned(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Return :math:`Q diag(g) Q^T x` along the last axis; x itself where nothing was folded.

        Args:
            x: (..., width).
            gain: g, if another than the one that is stored.
        """
        gain = self.gain if gain is None else gain
        if self.fold is None or gain is None or self.seed is None:
            return x
        if self._rotation is None:
            self._rotation = residual_rotation(self.fold, self.in_features, int(self.seed.item()))
        inner = self._rotation.apply_T(x) * gain.to(x.device)
        return self._rotation.apply(inner).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., vocabulary) of hidden states (..., width)."""
        with _present(self.embedding) as embedding:
            inner = self.turned(x).to(embedding.weight.device)
            if isinstance(embedding, PackedWeight):
                y = embedding.multiply(inner)
            else:
                y = F.linear(inner, embedding.weight.to(inner.dtype))
        y = y.to(x.device)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self) -> Tensor:
        """Return the matrix of an ordinary head, (vocabulary, width), float32."""
        with _present(self.embedding) as embedding:
            dense = (
                embedding.dequantize()
                if isinstance(embedding, PackedWeight)
                else embedding.weight.detach().float()
            )
        return self.turned(dense)

    def extra_repr(self) -> str:
        """Name widths and what is tied, as torch prints modules."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"fold={self.fold}, bias={self.bias is not None}"
        )


@contextmanager
def _present(embedding: nn.Embedding) -> Iterator[nn.Embedding]:
    """Bring in an embedding that accelerate keeps in a file or elsewhere while it is not used."""
    hook: Any = getattr(embedding, "_hf_hook", None)
    away = embedding.weight.is_meta and hook is not None
    if away:
        hook.pre_forward(embedding)
    try:
        yield embedding
    finally:
        if away:
            hook.post_forward(embedding, None)
