"""What a fused linear loss is told beside tensors: one record for every implementation.

An operator of torch's dispatcher takes tensors, numbers and strings only, so `Settings` can be
written as such a list and read back; its schema is made of the same fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlo_core.functional import IGNORE_INDEX
from rlo_core.linear.link_codes import decode, encode
from rlo_core.linear.parallel import Ranks, ranks_of
from rlo_core.links import Link

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA_TYPES = {
    "str": "str",
    "float": "float",
    "float | None": "float?",
    "int": "int",
    "bool": "bool",
    "Tensor | None": "Tensor?",
    "torch.dtype": "ScalarType",
}


@dataclass(frozen=True)
class Settings:
    """Options, plan, place in the vocabulary, link and wanted gradients of one call."""

    compute: torch.dtype
    """Dtype of the matrix products and of the tile of logits."""
    classes: int
    """Over all ranks."""
    first_class: int = 0
    """The class of the weight's first row."""
    group: str = ""
    """Name of the process group whose ranks share the vocabulary; "" for one that is whole."""
    ignore_index: int = IGNORE_INDEX
    label_smoothing: float = 0.0
    softcap: float | None = None
    rows: int = 512
    """Tokens per chunk, at most."""
    columns: int = 0
    """Classes per block of the two passes; 0 for the loop over chunks of tokens."""
    weight_dtype: torch.dtype = torch.float32
    """Dtype of the weight's gradient."""
    link: str = "ce"
    """The link as a code, see `link_codes`, and its two numbers."""
    a: float = 0.0
    b: float = 0.0
    knobs: Tensor | None = None
    """The two numbers as a tensor on the CPU while compiling."""
    hidden_grad: bool = False
    weight_grad: bool = False
    bias_grad: bool = False

    @property
    def any_grad(self) -> bool:
        """Whether the logits have to become a gradient."""
        return self.hidden_grad or self.weight_grad or self.bias_grad

    @property
    def ranks(self) -> Ranks | None:
        """The ranks that hold the vocabulary's other parts."""
        return ranks_of(self.group)

    def with_link(self, link: Link) -> Settings:
        """Return these settings for a link."""
        name, a, b = encode(link)
        knobs = None
        if torch.compiler.is_compiling():
            # A float argument of an operator is a constant of the graph: a scheduled k would
            # compile anew at every step. As a tensor on the CPU it is not, and reading it waits
            # for nothing.
            one = torch.ones((), dtype=torch.float64, device="cpu")
            knobs, a, b = torch.stack([one * a, one * b]), 0.0, 0.0
        return replace(self, link=name, a=a, b=b, knobs=knobs)

    def decoded(self) -> Link:
        """Return the link."""
        a, b = (self.a, self.b) if self.knobs is None else self.knobs.tolist()
        return decode(self.link, a, b)

    def with_grads(
        self, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Settings:
        """Return these settings with the gradients that a backward pass will ask for."""
        recording = torch.is_grad_enabled()
        hidden_grad, weight_grad, bias_grad = (
            recording and t is not None and t.requires_grad for t in (hidden, weight, bias)
        )
        dtype = self.weight_dtype if weight is None else gradient_dtype(weight)
        return replace(
            self,
            weight_dtype=dtype,
            hidden_grad=hidden_grad,
            weight_grad=weight_grad,
            bias_grad=bias_grad,
        )

    def without_grads(self) -> Settings:
        """Return these settings for the loss alone."""
        return replace(self, hidden_grad=False, weight_grad=False, bias_grad=False)

    def arguments(self) -> tuple[Any, ...]:
        """Return the fields in the order of `SCHEMA`."""
        return tuple([getattr(self, name) for name in NAMES])

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> Self:
        """Undo `arguments`."""
        return cls(*arguments)


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """The dtype a weight's gradient is wanted in: its `grad_dtype` where torch has one."""
    if torch.compiler.is_compiling() or not weight.is_leaf:
        return weight.dtype
    return getattr(weight, "grad_dtype", None) or weight.dtype


NAMES = tuple(field.name for field in fields(Settings))
SCHEMA = ", ".join(f"{SCHEMA_TYPES[str(f.type)]} {f.name}" for f in fields(Settings))
"""The fields as the arguments of an operator."""
