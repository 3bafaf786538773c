r"""Incoherence without run-time cost: random rotations folded into the weights of a model.

With Q orthogonal, a residual stream x can be carried as Qx: every matrix that writes to it becomes
:math:`Q W`, every one that reads it :math:`W Q^T`, and nothing has to be rotated at run time.
RMSNorm commutes with Q once its gain g is moved into the readers, :math:`W \operatorname{diag}(g)
Q^T`. The values of attention are rotated head by head between `v_proj` and `o_proj` as well. What
stays in its own basis is the input of the second MLP matrix, behind the non-linearity.

OPT's LayerNorm also takes the mean off, which only commutes with a Q that fixes the vector of ones.
`residual_rotation` makes both kinds.

Sources: Ashkboos et al., "QuaRot", 2024 (the folding); LayerNorm by a Q that keeps the mean is
ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rlo_core.errors import RLOError
from torch import Tensor

from rlo_gptq.rounding.residual_rotation import residual_rotation
from rlo_gptq.rounding.rotation import Rotation

_HEAD_STREAM = 96  # apart from the streams of the layers' and the residual stream's rotations
# Below this share of the largest gain, dividing a bias by it would blow rounding errors up.
_SMALLEST_GAIN = 1e-4


class FoldError(RLOError):
    """A model whose rotations cannot be folded into its weights."""


@dataclass(frozen=True)
class Family:
    """The names of one kind of decoder; `{i}` stands for the block's number.

    Args:
        embeddings: What writes to the residual stream from outside the blocks.
        reads: By norm, the matrices of a block that read the residual stream through it.
        writes: The matrices of a block that write to it.
        value: The value projection.
        output: The attention's output projection.
        final_norm: The norm before the head.
        blocks: Prefix of the blocks.
        layer_norm: Whether the norms take off the mean and have a bias.
        gain_offset: What the class adds to the stored gain (Gemma: 1).
    """

    embeddings: tuple[str, ...]
    reads: Mapping[str, tuple[str, ...]]
    writes: tuple[str, ...]
    value: str
    output: str
    final_norm: str
    blocks: str
    layer_norm: bool = False
    gain_offset: float = 0.0

    @property
    def rotation(self) -> str:
        """The kind of `residual_rotation` that the norms commute with."""
        return "mean" if self.layer_norm else "hadamard"


_LLAMA = Family(
    embeddings=("model.embed_tokens",),
    reads={
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
    writes=("self_attn.o_proj", "mlp.down_proj"),
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    final_norm="model.norm",
    blocks="model.layers",
)
_GEMMA = Family(**{**_LLAMA.__dict__, "gain_offset": 1.0})
_OPT = Family(
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    reads={
        "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "final_layer_norm": ("fc1",),
    },
    writes=("self_attn.out_proj", "fc2"),
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    final_norm="model.decoder.final_layer_norm",
    blocks="model.decoder.layers",
    layer_norm=True,
)
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _GEMMA,
    "opt": _OPT,
}
"""By `config.model_type`; other kinds need the online form of incoherence."""


def check_foldable(config: Mapping[str, Any]) -> Family:
    """Return the family of a model's `config.json`.

    Raises:
        FoldError: its rotations cannot be folded; the message says why and what works instead.
    """
    kind = config.get("model_type")
    online = "use --incoherence hadamard, which rotates at run time"
    if kind not in FAMILIES:
        raise FoldError(
            f"--rotate fold takes model types {', '.join(FAMILIES)}, got {kind!r}; {online}"
        )
    if kind == "opt":
        if not config.get("do_layer_norm_before", True):
            raise FoldError(
                f"--rotate fold needs OPT's norms before the layers, not after; {online}"
            )
        if config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"]:
            raise FoldError(f"--rotate fold takes no OPT with projected embeddings; {online}")
        if not config.get("layer_norm_elementwise_affine", True):
            raise FoldError(f"--rotate fold takes no OPT without norm gains; {online}")
    return FAMILIES[str(kind)]


class Fold:
    """The folded weights of one model, computed a tensor at a time.

    Args:
        config: The model's `config.json`.
        names: The names of all its tensors.
        load: Returns a tensor by name.
        seed: Of the generator.

    Raises:
        FoldError: the model's kind or its tensors do not fit.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        names: Iterable[str],
        load: Callable[[str], Tensor],
        *,
        seed: int,
    ) -> None:
        self.family = check_foldable(config)
        self.names = set(names)
        self.load = load
        width = int(config["hidden_size"])
        heads = int(config["num_attention_heads"])
        self.head_dim = int(config.get("head_dim") or width // heads)
        self.residual = residual_rotation(self.family.rotation, width, seed)
        self.head = Rotation("hadamard", self.head_dim, seed, stream=_HEAD_STREAM)
        self._norm_of = {r: norm for norm, readers in self.family.reads.items() for r in readers}
        self._embedding = f"{self.family.embeddings[0]}.weight"
        if self._embedding not in self.names:
            raise FoldError(f"--rotate fold needs a tensor {self._embedding!r}, which is not there")

    @property
    def output_names(self) -> list[str]:
        """The names of the folded model's tensors: its own head too, where it was tied."""
        return sorted(self.names | {"lm_head.weight"})

    def head_gain(self) -> Tensor:
        """Return the gain g of the norm before the head, which is folded into it, (width,)."""
        return self._gain(self.family.final_norm)

    def tensor(self, name: str) -> Tensor:
        """Return one folded tensor, float64 where it changed."""
        if name == "lm_head.weight":
            head = self.load(name if name in self.names else self._embedding).double()
            return self.residual.apply(head * self.head_gain())
        module, _, part = name.rpartition(".")
        value = self.load(name)
        if module in self.family.embeddings:
            return self.residual.apply(value.double())
        if module == self.family.final_norm:
            return self._final_norm(part, value)
        local = self._local(module)
        if local is None:
            return value
        block = module[: -len(local) - 1]
        if local in self.family.reads:
            return self._unit_norm(part, value)
        if local in self._norm_of:
            return self._reader(block, local, part, value.double())
        if local in self.family.writes:
            return self._writer(local, part, value.double())
        return value

    def _local(self, module: str) -> str | None:
        """Return the name inside its block, or None outside the blocks."""
        prefix = f"{self.family.blocks}."
        if not module.startswith(prefix):
            return None
        return module[len(prefix) :].partition(".")[2] or None

    def _gain(self, norm: str) -> Tensor:
        return self.load(f"{norm}.weight").double() + self.family.gain_offset

    def _unit_norm(self, part: str, value: Tensor) -> Tensor:
        if part == "weight":
            return torch.full_like(value, 1.0 - self.family.gain_offset)
        return torch.zeros_like(value)

    def _final_norm(self, part: str, value: Tensor) -> Tensor:
        if part == "weight":
            return self._unit_norm(part, value)
        # The head has no bias to take the norm's: it stays in the norm, before the moved gain.
        gain = self._gain(self.family.final_norm)
        if float(gain.abs().min()) < _SMALLEST_GAIN * float(gain.abs().max()):
            raise FoldError(
                f"--rotate fold cannot divide the bias of {self.family.final_norm} by its gain, "
                f"whose smallest is {float(gain.abs().min()):.2g}; use --incoherence hadamard"
            )
        return self.residual.apply(value.double() / gain)

    def _reader(self, block: str, local: str, part: str, value: Tensor) -> Tensor:
        norm = f"{block}.{self._norm_of[local]}"
        if part == "bias":
            if self.family.layer_norm:
                weight = self.load(f"{block}.{local}.weight").double()
                value = value + weight @ self.load(f"{norm}.bias").double()
            return self._rotate_heads(value) if local == self.family.value else value
        value = self.residual.apply(value * self._gain(norm))
        return self._rotate_heads(value.T).T if local == self.family.value else value

    def _writer(self, local: str, part: str, value: Tensor) -> Tensor:
        if part == "bias":
            return self.residual.apply(value)
        if local == self.family.output:
            value = self._rotate_heads(value)
        return self.residual.apply(value.T).T

    def _rotate_heads(self, value: Tensor) -> Tensor:
        """Rotate each head's coordinates along the last axis."""
        return self.head.apply(value.reshape(*value.shape[:-1], -1, self.head_dim)).reshape(
            value.shape
        )


def folded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of the folded model: the same with a head of its own."""
    return {**config, "tie_word_embeddings": False}
