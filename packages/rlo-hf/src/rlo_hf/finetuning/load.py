"""Causal language models by folder, GGUF file or hub name, with their tokenizer.

A package that saves models in a form of its own adds a loader with an entry point in the group
`rlo_core.model_loaders`, named as the `quant_method` in the model's config.json:

    loader(folder: str) -> transformers model

and, in the group `rlo_core.adapter_initializers`, what begins adapters at the quantization error:

    initializer(peft_model, original: str) -> object
"""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rlo_core.errors import PluginError, RLOError

LOADER_GROUP = "rlo_core.model_loaders"
INITIALIZER_GROUP = "rlo_core.adapter_initializers"


class ModelError(RLOError):
    """A model that is not there, or that cannot be loaded."""


def load_model(model: str, *, dtype: Any = None, trust_remote_code: bool = False) -> Any:
    """Return a causal language model, in evaluation mode.

    Args:
        model: A folder, a .gguf file (or a folder whose only model file is one), a hub name, or a
            folder with an adapter (`adapter_config.json`), which is loaded on its base.
        dtype: A torch dtype; None keeps that of the file.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ModelError: it is not there, not a causal language model, or needs a package that is
        missing.
    """
    folder, gguf = _gguf(model)
    path = Path(folder)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        return _adapted(path, dtype=dtype, trust_remote_code=trust_remote_code)
    method = _quant_method(path)
    loader = _plugin(method) if method else None
    if loader is not None:
        return loader(folder)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if dtype is not None:
        options["dtype"] = dtype
    if gguf is not None:
        _needs("gguf", "GGUF models", "gguf")
        options["gguf_file"] = gguf
    import transformers

    loaded = _loaded(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, **options), model
    )
    if gguf is not None:
        _unmark(loaded)
    return loaded.eval()


def begin_at_error(model: Any, name: str, original: str) -> None:
    """Set a quantized model's untrained LoRA adapters to correct its error, as LoftQ does.

    Args:
        model: From `peft.get_peft_model`.
        name: What `load_model` was given, for an error.
        original: The model that was quantized.

    Raises:
        ModelError: the model is not quantized in a form that can tell its error.
    """
    config = getattr(model.get_base_model().config, "quantization_config", None)
    found = config.get("quant_method") if isinstance(config, dict) else config
    method = getattr(found, "quant_method", found)
    entries = entry_points(group=INITIALIZER_GROUP)
    for entry in entries:
        if entry.name == method:
            entry.load()(model, original)
            return
    known = ", ".join(sorted(entry.name for entry in entries)) or "none"
    raise ModelError(
        f"--lora-init loftq needs a model quantized by one of: {known}; {name!r} is "
        + ("not quantized" if method is None else f"quantized by {str(method)!r}")
    )


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer that belongs to a model; see `load_model`."""
    import transformers

    folder, gguf = _gguf(model)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf is not None:
        options["gguf_file"] = gguf
    return _loaded(
        lambda: transformers.AutoTokenizer.from_pretrained(folder, **options), model, "tokenizer"
    )


def _loaded(load: Any, model: str, what: str = "model") -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        local = Path(model).exists()
        hint = "" if local else "; without a network give a local folder or .gguf file"
        raise ModelError(
            f"{what} {model!r} could not be loaded ({type(error).__name__}: {reason}){hint}"
        ) from error


def _unmark(model: Any) -> None:
    """Make a model from a GGUF file what it is, a float model: to be trained, cast and saved."""
    model.is_quantized = False
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)


def _gguf(model: str) -> tuple[str, str | None]:
    """Return the folder (or hub name) and the name of the GGUF file in it, if it is one."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file {model!r}")
        return str(path.parent), path.name
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return model, found[0].name
        if found:
            names = ", ".join(file.name for file in found)
            raise ModelError(f"folder {model!r} has several GGUF files; give one of {names}")
    return model, None


def _quant_method(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    return method if isinstance(method, str) else None


def _plugin(method: str) -> Any:
    """Return the loader of a quantization method, or None where transformers has it itself."""
    for entry in entry_points(group=LOADER_GROUP, name=method):
        try:
            return entry.load()
        except Exception as error:
            raise PluginError(
                f"model loader {method!r} failed to import ({type(error).__name__}: {error})"
            ) from error
    if method.startswith("rlo"):
        # Importing the package registers its quantizer with transformers.
        _needs("rlo_gptq", f"{method} models", "rlo-gptq")
    return None


def _needs(module: str, what: str, package: str) -> None:
    import importlib

    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(f"{what} need the package {package}: pip install {package}") from error


def _adapted(folder: Path, *, dtype: Any, trust_remote_code: bool) -> Any:
    _needs("peft", "adapters", "peft")
    import peft

    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{str(folder / 'adapter_config.json')!r} is not JSON: {error}") from error
    name = base.get("base_model_name_or_path")
    if not name:
        raise ModelError(f"adapter {str(folder)!r} does not name its base model")
    model = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True).eval()
