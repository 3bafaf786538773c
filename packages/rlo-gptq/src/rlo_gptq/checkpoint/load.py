"""Load a packed checkpoint, its files checked first; the settings that its config.json names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rlo_core.errors import RLOError

from rlo_gptq.checkpoint.digests import check_digests
from rlo_gptq.checkpoint.hf_quantizer import METHOD, VERSION, RLOGPTQConfig, as_error
from rlo_gptq.checkpoint.validation import (
    check_folder,
    check_sizes,
    every_tensor_used,
    read_headers,
    read_object,
    require,
    weight_paths,
)
from rlo_gptq.models.digests import unverified
from rlo_gptq.settings import LayerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantization_config(
    settings: LayerSettings,
    *,
    blocks: str,
    modules: Mapping[str, list[int] | None],
    experts: bool = False,
    permuted: bool = False,
    outside: Mapping[str, Any] | None = None,
    bits: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config` of config.json; see `RLOGPTQConfig` for the fields."""
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "settings": settings.to_dict(),
        "blocks": blocks,
        "modules": dict(modules),
        "split_experts": experts,
        **({"permuted": True} if permuted else {}),  # other readers need to know only then
        **({"outside": dict(outside)} if outside else {}),
        **({"bits": dict(bits)} if bits else {}),
    }


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> PreTrainedModel:
    """Load a quantized model, as `AutoModelForCausalLM.from_pretrained` does, with its files
    checked first.

    Args:
        folder: The checkpoint, or a hub name.
        dtype: Of the unquantized weights and of the activations; "auto" is that of the original.
        device_map: As transformers takes it, e.g. "auto" or {"": "cuda:0"}.
        trust_remote_code: Let transformers run code from the folder.
        verify: Hold all files against the digests in the checkpoint, where it has some.

    Raises:
        RLOError: the checkpoint is damaged, hostile, or not ours; or config.json and the tensors
            contradict each other.
    """
    from transformers import AutoModelForCausalLM

    path = Path(folder)
    if path.exists():
        check_folder(path)
        found = read_quantization(path)
        method = found.get("quant_method")
        require(method == METHOD, f"{str(path)!r} must be quantized by {METHOD}, got {method!r}")
        RLOGPTQConfig.from_dict(found)
        check_sizes(read_object(path / "config.json"), read_headers(weight_paths(path)))
        with unverified(when=not verify):  # last: what is wrong says more than that something is
            check_digests(path)
    try:
        with every_tensor_used():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
            )
    except RLOError:
        raise
    except Exception as error:  # a hostile config.json provokes any of them
        raise as_error(error) from error
    return model


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model's folder, sorted."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf"))


def weight_bytes(folder: Path) -> int:
    """Return the bytes of all weight files of a model's folder."""
    return sum(file.stat().st_size for file in weight_files(folder))


def read_quantization(folder: Path) -> dict[str, Any]:
    """Return the `quantization_config` of a folder; empty for a model that is not quantized.

    Raises:
        CheckpointError: config.json is missing or is no JSON object.
    """
    config = read_object(folder / "config.json")
    found = config.get("quantization_config") or {}
    require(isinstance(found, dict), f"quantization_config must be an object, got {found!r}")
    return dict(found)
