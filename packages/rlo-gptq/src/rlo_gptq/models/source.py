"""The model to quantize, read tensor by tensor: safetensors, an old torch file, or GGUF.

The skeleton of the model is on the meta device. Blocks get their weights when asked for and lose
them when released, so that one block at a time is in memory. The names and layouts of checkpoints
are transformers' business: its own renamings and conversions are applied to the tensors of each
part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from rlo_core.errors import RLOError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from rlo_gptq.models.digests import cache_folder, kept_digest
from rlo_gptq.models.stored_types import gguf_types, read_stored_types, write_stored_types

_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class SourceError(RLOError):
    """A model that cannot be found or read."""


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from drawing a progress bar for each block or small model."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def find_model(name: str, *, cache: Path | None = None) -> Path:
    """Return the folder of a model in safetensors (or an old torch file).

    Args:
        name: A folder, a .gguf file, a folder with one .gguf file, or a hub name.
        cache: Where a GGUF model is kept after it was turned into safetensors.

    Raises:
        SourceError: there is no such model, or no weights in it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if any((path / file).is_file() for file in (*_INDEX, *_SINGLE)):
            return path
        gguf = sorted(path.glob("*.gguf"))
        if len(gguf) == 1:
            return _from_gguf(gguf[0], cache)
        if gguf:
            raise SourceError(f"{name!r} has {len(gguf)} GGUF files; name one of them")
        raise SourceError(f"{name!r} has no weights: {', '.join((*_SINGLE, '*.gguf'))}")
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, cache)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise SourceError(f"no model at {name!r}: no such folder")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    texts = ["*.json", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, allow_patterns=[*texts, "*.safetensors"])
        )
        if not list(folder.glob("*.safetensors")):
            patterns = [*texts, "pytorch_model*.bin"]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(
            f"no model {name!r}: no such folder, and the hub's answer was {type(error).__name__}: "
            f"{reason[:160]}"
        ) from error
    if not any((folder / file).is_file() for file in (*_INDEX, *_SINGLE)):
        raise SourceError(f"hub model {name!r} has no weights: {', '.join(_SINGLE)}")
    return folder


def _from_gguf(file: Path, cache: Path | None) -> Path:
    """Turn a GGUF file into a safetensors folder, once; the whole model passes through memory."""
    stat = file.stat()
    tag = hashlib.sha256(f"2:{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    root = cache if cache is not None else cache_folder()
    folder = root / f"{file.stem}-{tag.hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoTokenizer

    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise SourceError(f"reading {file.name!r} needs the package gguf: {error}") from error
    except Exception as error:  # a damaged file raises whatever its bytes say
        reason = " ".join(str(error).split())[:160]
        raise SourceError(
            f"{str(file)!r} could not be read as GGUF ({type(error).__name__}: {reason})"
        ) from error
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # The weights are floats by now; transformers would still refuse to save what was GGUF.
        quantizer.remove_quantization_config(model)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_stored_types(partial, gguf_types(file))
        try:
            partial.replace(folder)
        except OSError:  # another process may have converted the same file in the meantime
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


class ModelSource:
    """A causal language model on disk and its skeleton in memory.

    Args:
        folder: From `find_model`.
        dtype: In which the blocks are run.
        device: Where they are run.
        trust_remote_code: Let transformers run code from the folder.

    Raises:
        SourceError: the folder has no readable model, or one that is quantized already.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = folder
        self.device = torch.device(device)
        self.dtype = dtype
        try:
            self.config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # a hostile config.json provokes any of them
            reason = " ".join(str(error).split())[:160]
            raise SourceError(f"{str(folder)!r} has no readable config.json: {reason}") from error
        if getattr(self.config, "quantization_config", None) is not None:
            method = self.config.quantization_config.get("quant_method")
            raise SourceError(f"{str(folder)!r} is quantized already, with {method}")
        self.stored_dtype = self.config.dtype or torch.float32
        try:
            with init_empty_weights(include_buffers=False):
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    self.config, dtype=dtype, trust_remote_code=trust_remote_code
                )
        except ValueError as error:
            raise SourceError(
                f"{self.config.model_type!r} is not a causal language model: {error}"
            ) from error
        self.model.eval()
        self._open()

    def _open(self) -> None:
        """Find every tensor, and the name it has in the model."""
        files, weight_map = self._files()
        self._tensors: dict[str, Path | Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file in files:
            self._open_file(file, weight_map)
        self._mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        names = self.model.state_dict()
        prefix = self.model.base_model_prefix
        self._targets: dict[str, str] = {}
        for key in self._tensors:
            target, _ = rename_source_key(key, renamings, converters, prefix, names)
            if target not in names and key in names:
                target, _ = rename_source_key(key, [], [], prefix, names)
            if target in names:
                self._targets[key] = target
        self.in_file: dict[str, torch.dtype] = {}
        for key, target in self._targets.items():
            self.in_file.setdefault(target, self._dtypes[key])
        self.came_as = read_stored_types(self.folder)

    def _files(self) -> tuple[list[Path], dict[str, str] | None]:
        for single, index in zip(_SINGLE, _INDEX, strict=True):
            if (self.folder / index).is_file():
                weight_map = _weight_map(self.folder / index)
                files = sorted({self.folder / Path(name).name for name in weight_map.values()})
                missing = [file.name for file in files if not file.is_file()]
                if missing:
                    raise SourceError(f"{str(self.folder)!r} lacks {', '.join(missing)}")
                return files, weight_map
            if (self.folder / single).is_file():
                return [self.folder / single], None
        raise SourceError(f"{str(self.folder)!r} has no weights: {', '.join(_SINGLE)}")

    def _open_file(self, file: Path, weight_map: dict[str, str] | None) -> None:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as handle:
                    for key in handle.keys():  # noqa: SIM118 - it is no mapping
                        kind = str(handle.get_slice(key).get_dtype())
                        self._tensors[key] = file
                        self._dtypes[key] = _SAFETENSORS_DTYPES.get(kind, self.stored_dtype)
            except Exception as error:  # safetensors has one exception type, outside any family
                raise SourceError(f"{str(file)!r} is not a safetensors file: {error}") from error
            return
        for key, tensor in _torch_tensors(file).items():
            self._tensors[key] = tensor
            self._dtypes[key] = tensor.dtype

    def close(self) -> None:
        """Forget the tensors of an old torch file, which stay mapped until then."""
        self._tensors.clear()

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with the configuration or the weights.

        It is of all bytes of the weight files; where they lie does not matter.
        """
        config = self.config.to_dict()
        config.pop("_name_or_path", None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        files, _ = self._files()
        for file in files:
            digest.update(f"{file.name}:{kept_digest(file)}".encode())
        return digest.hexdigest()[:16]

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the model in the type it is stored in: that it came in."""
        stored = self.in_file.get(name)
        if stored is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(self.came_as.narrowed(tensor, stored))

    def targets(self, keep: Callable[[str], bool]) -> list[str]:
        """Return the model's names of the stored tensors for which `keep` holds, sorted."""
        return sorted({target for target in self._targets.values() if keep(target)})

    def load(self, keep: Callable[[str], bool]) -> None:
        """Fill the tensors of the skeleton whose names `keep` accepts.

        Raises:
            SourceError: a stored tensor has the wrong shape.
        """
        wanted = [key for key, target in self._targets.items() if keep(target)]
        config = LoadStateDictConfig(
            dtype=self.dtype,
            device_map={"": self.device},
            weight_mapping=cast("list[WeightConverter | WeightRenaming]", self._mapping),
        )
        # Files are open only here: pages of a mapped file count as this process's memory.
        with quiet_loading(), ExitStack() as stack:
            files = {at for key in wanted if isinstance(at := self._tensors[key], Path)}
            handles = {at: stack.enter_context(safe_open(at, framework="pt")) for at in files}
            chosen = {
                key: handles[at].get_slice(key) if isinstance(at, Path) else at
                for key in wanted
                for at in [self._tensors[key]]
            }
            info, _ = convert_and_load_state_dict_in_model(self.model, chosen, config)
        if info.mismatched_keys:
            name, stored, expected = sorted(info.mismatched_keys, key=str)[0]
            raise SourceError(
                f"tensor {name!r} must have shape {tuple(expected)}, got {tuple(stored)}"
            )
        if info.conversion_errors:
            raise SourceError(f"tensors could not be converted: {info.conversion_errors}")

    def load_module(self, name: str) -> nn.Module:
        """Fill the module `name` and return it.

        Raises:
            SourceError: the checkpoint lacks one of its tensors.
        """
        self.load(lambda target: target.startswith(f"{name}."))
        module = self.model.get_submodule(name)
        require_filled(module, f"{name}.")
        return module


def _weight_map(index: Path) -> dict[str, str]:
    """Return the files of the tensors that an index names.

    Raises:
        SourceError: it is not such an index.
    """
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise SourceError(f"{str(index)!r} is not an index of weight files: {error}") from error
    named = isinstance(weight_map, dict) and all(
        isinstance(name, str) and name for name in weight_map.values()
    )
    if not named or not weight_map:
        raise SourceError(f"{str(index)!r} is not an index of weight files: it names none")
    return dict(weight_map)


def _torch_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of an old torch file; no code of it is run.

    Raises:
        SourceError: it is no such file, holds other things than tensors, or is damaged.
    """
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file from before the zip format cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes say
        reason = " ".join(str(error).split())[:160]
        raise SourceError(
            f"{str(file)!r} is not a file of tensors ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(state, dict):
        raise SourceError(f"{str(file)!r} must hold tensors by name, got {type(state).__name__}")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise SourceError(
                f"{str(file)!r} must hold tensors by name, got {type(tensor).__name__} at {key!r}"
            )
    return state


def require_filled(
    module: nn.Module, prefix: str = "", *, except_for: tuple[str, ...] = ()
) -> None:
    """Refuse a module of which a parameter was not in the checkpoint.

    Args:
        module: Whose parameters are looked at.
        prefix: Put before the names, for the error.
        except_for: Beginnings of names that may be missing.

    Raises:
        SourceError: names the tensor.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta and not (except_for and name.startswith(except_for)):
            raise SourceError(f"the checkpoint lacks tensor {prefix + name!r}")


def release(module: nn.Module) -> None:
    """Give up the weights of a module: its parameters go to the meta device, its buffers stay."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device="meta")
            setattr(child, name, nn.Parameter(empty, requires_grad=False))
