"""Everything a user decides of one quantization; imports no torch."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from rlo_gptq.bit_rules import Rules
from rlo_gptq.settings import BITS, EndToEndSettings, LayerSettings, TuneSettings, one_of

PLAIN = "plain"
"""The Hessian of unweighted tokens."""


@dataclass(frozen=True)
class Options:
    """Everything a user decides of one quantization.

    Args:
        model: A folder, a GGUF file or a hub name.
        dataset: What `rlo_core.lm.text.load_text` takes; its training split, or its validation
            split where there is no training split.
        layer: How each layer is rounded.
        nsamples: Calibration sequences.
        seqlen: Tokens in each; None is the model's length, at most 2048.
        seed: Of the sequences, the transforms and stochastic rounding.
        true_sequential: Inside a block, later layers see the earlier ones quantized.
        skip: Patterns of full layer names that stay as they are.
        dtype: In which blocks are run.
        offload: Keep activations in a file.
        trust_remote_code: Let transformers run code from the model's folder.
        split: Of the data set; None for "train", else "validation".
        hessian: "plain", or a loss spec by whose slope calibration tokens are weighted.
        hessian_energy: Weight them by that loss's squared gradient instead of by its slope.
        rotate: "fold" folds random rotations into the weights before anything else.
        tune: Finetune each block's scales and norms against its dense output; None does not.
        end_to_end: Finetune the packed model against the dense one's output; None does not.
        embed_bits: Bits of the token embedding: one of `BITS` quantizes it, 16 and 32 store it so;
            None is 8 where layers have at most 4 bits, and what it came with otherwise.
        head_bits: Bits of the output head, likewise; a tied head has those of the embedding.
        formats: Other formats it is going to be written in; what they cannot hold is refused before
            anything is done.
        gguf: The type of a GGUF file to make instead of a checkpoint, e.g. "Q4_K_M".
        bits: Rules for the bits of some layers, see `rlo_gptq.bit_rules`; of two the later wins.
    """

    model: str
    dataset: str
    layer: LayerSettings
    nsamples: int = 128
    seqlen: int | None = None
    seed: int = 0
    true_sequential: bool = True
    skip: tuple[str, ...] = ()
    dtype: str = "float32"
    offload: bool = False
    trust_remote_code: bool = False
    split: str | None = None
    hessian: str = PLAIN
    hessian_energy: bool = False
    rotate: str | None = None
    tune: TuneSettings | None = None
    end_to_end: EndToEndSettings | None = None
    embed_bits: int | None = None
    head_bits: int | None = None
    formats: tuple[str, ...] = ()
    gguf: str | None = None
    bits: Rules = ()

    def __post_init__(self) -> None:
        for name in ("embed_bits", "head_bits"):
            one_of(name, getattr(self, name), (None, *BITS, 16, 32))

    def decisions(self) -> dict[str, Any]:
        """Return what decides the codes: not where the model is, nor how activations are kept.

        Nor what is done with the checkpoint afterwards.
        """
        deciding = asdict(self)
        for name in ("model", "dataset", "offload", "trust_remote_code", "split", "formats"):
            del deciding[name]
        del deciding["end_to_end"]
        if not self.bits:  # as before there were any
            del deciding["bits"]
        return deciding


def layer_seed(seed: int, name: str) -> int:
    """Return the seed of a layer's transform, in [0, 2^63): the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
