"""Whether the tool that an export is for reads it with the same outputs: reload it, compare."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlo_gptq.formats.gptq import FormatError

Peer = Literal["transformers", "gptqmodel"]
TOLERANCE = 2e-2
"""Largest difference of a logit, relative to the largest logit: the peers compute in half precision
(measured: below 3e-3); a wrong zero or group is off by 0.5 and more."""


@dataclass(frozen=True)
class Verified:
    """What a comparison found.

    Args:
        peer: Who loaded the export.
        version: Of the peer.
        difference: Largest difference of a logit, relative to the largest logit.
        layer: The peer's class for a quantized layer, where it has one.
    """

    peer: str
    version: str
    difference: float
    layer: str


def check_peer(peer: Peer, format: str) -> None:
    """Refuse a peer that is not installed, before anything is written for it.

    Args:
        peer: "transformers" or "gptqmodel".
        format: "gptq" or "compressed-tensors".

    Raises:
        FormatError: says what to install.
    """
    needed = {"gptqmodel": ["gptqmodel"], "transformers": []}[peer]
    if peer == "transformers" and format == "gptq":
        needed = ["optimum", "gptqmodel"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise FormatError(
            f"--verify-with {peer} needs {' and '.join(missing)} for this format; "
            "pip install 'rlo-gptq[gptqmodel]'"
        )


def verify_export(ours: Path, exported: Path, peer: Peer, *, tokens: int = 64) -> Verified:
    """Load `exported` in `peer`, on the CPU, and compare its logits with those of `ours`.

    Args:
        ours: The checkpoint that was exported.
        exported: The export.
        peer: "transformers" or "gptqmodel".
        tokens: Length of the sequence that is compared.

    Raises:
        FormatError: the peer is not installed, cannot load the export, or its logits differ by more
            than `TOLERANCE`.
    """
    gptq = (exported / "quantize_config.json").is_file()
    check_peer(peer, "gptq" if gptq else "compressed-tensors")
    from rlo_gptq.checkpoint.load import load

    model = load(ours, dtype=torch.float32)
    size = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    sequence = torch.randint(0, size, (1, tokens), generator=generator)
    expected = _logits(model, sequence)
    names = [name for name, m in model.named_modules() if type(m).__name__ == "QuantLinear"]
    del model
    try:
        with _quiet_stdout():
            theirs = _load_in(peer, exported)
            found = _logits(theirs, sequence)
    except (
        ValueError,
        RuntimeError,
        TypeError,
        OSError,
        ImportError,
        NotImplementedError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise FormatError(f"{peer} could not load the export: {reason}") from error
    difference = float((found - expected).abs().max() / expected.abs().max())
    layer = type(theirs.get_submodule(names[0])).__name__ if names else ""
    if not difference <= TOLERANCE:
        raise FormatError(
            f"{peer} must give our logits to {TOLERANCE} of the largest, got {difference:.3g}"
        )
    return Verified(peer, version(peer), difference, layer)


def _logits(model: nn.Module, sequence: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(sequence).logits
    return logits.float()


def _load_in(peer: Peer, folder: Path) -> nn.Module:
    if peer == "gptqmodel":
        # One worker a core: its default starts more threads than a small machine has.
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count() or 1))
        import gptqmodel

        # The plain torch kernel: the others are compiled for minutes when they are first used.
        loaded = gptqmodel.GPTQModel.load(
            str(folder), backend=gptqmodel.BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
        )
        inner: nn.Module = loaded.model
        return inner
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        CompressedTensorsConfig,
        GPTQConfig,
    )

    options: dict[str, Any] = {"dtype": torch.float32}
    found = AutoConfig.from_pretrained(folder).quantization_config
    if found.get("quant_method") == "compressed-tensors" and not _symmetric(found):
        # transformers 5.23 makes room for unpacked zero points, which the format does not have; its
        # dequantizing path reads the packed ones.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if found.get("quant_method") == "gptq":  # the plain torch kernel here too
        options["quantization_config"] = GPTQConfig(bits=found["bits"], backend="gptq_torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


def _symmetric(found: dict[str, Any]) -> bool:
    return all(group["weights"]["symmetric"] for group in found["config_groups"].values())


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Send what a peer prints to stderr: stdout is for one JSON document."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
