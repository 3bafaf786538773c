"""Causal language models by folder, GGUF file, hub name or adapter, with their tokenizer.

The one place where a command opens a model. transformers is imported when it is called.

A package that saves models in a form of its own adds a loader with an entry point in the group
`rlo_core.model_loaders`, named as the `quant_method` in the model's config.json:

    loader(folder: str, *, dtype: torch.dtype | str, device_map: Any) -> transformers model

and, in the group `rlo_core.adapter_initializers`, what begins adapters at the quantization error:

    initializer(peft_model, original: str) -> object
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlo_core.errors import RLOError
from rlo_core.plugins import ADAPTER_INITIALIZERS, MODEL_LOADERS, find_plugins, load_plugin

ADAPTER_FILE = "adapter_config.json"


class ModelError(RLOError):
    """A model that is not there, or that cannot be loaded."""


def open_model(
    model: str,
    *,
    dtype: Any = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return a causal language model, in evaluation mode.

    Args:
        model: A folder, a .gguf file (or a folder whose only model file is one), a hub name, or a
            folder with an adapter (`adapter_config.json`), which is loaded on its base, trainable.
        dtype: A torch dtype; None keeps that of the file.
        device_map: As transformers takes it, e.g. "auto" or {"": "cuda:0"}.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ModelError: it is not there, not a causal language model, or needs a package that is
            missing.
        PluginError: the loader of its format does not import.
    """
    folder, gguf = find_gguf(model)
    path = Path(folder)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if (path / ADAPTER_FILE).is_file():
        return _adapted(path, dtype=dtype, device_map=device_map, **options)
    method = quantization_method(path)
    if method in find_plugins(MODEL_LOADERS):
        loader = load_plugin(MODEL_LOADERS, method)
        loaded = loader(folder, dtype="auto" if dtype is None else dtype, device_map=device_map)
        return loaded.eval()
    if method is not None and method.startswith("rlo"):
        # Importing the package registers its quantizer with transformers.
        require_package("rlo_gptq", f"{method} models", "rlo-gptq")
    if dtype is not None:
        options["dtype"] = dtype
    if device_map is not None:
        options["device_map"] = device_map
    if gguf is not None:
        require_package("gguf", "GGUF models", "gguf")
        options["gguf_file"] = gguf
    import transformers

    loaded = _loaded(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, **options), model
    )
    if gguf is not None:
        _unmark(loaded)
    return loaded.eval()


def open_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer that belongs to a model (an adapter's: its base's); see `open_model`.

    Raises:
        ModelError: there is none.
    """
    import transformers

    folder, gguf = find_gguf(model)
    path = Path(folder)
    if (path / ADAPTER_FILE).is_file() and not (path / "tokenizer_config.json").is_file():
        return open_tokenizer(adapter_base(path), trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf is not None:
        options["gguf_file"] = gguf
    return _loaded(
        lambda: transformers.AutoTokenizer.from_pretrained(folder, **options), model, "tokenizer"
    )


def initialize_adapters(model: Any, name: str, original: str) -> None:
    """Set a quantized model's untrained LoRA adapters to correct its error, as LoftQ does.

    Args:
        model: From `peft.get_peft_model`.
        name: What `open_model` was given, for an error.
        original: The model that was quantized.

    Raises:
        ModelError: the model is not quantized in a form that can tell its error.
        PluginError: the initializer of its format does not import.
    """
    config = getattr(model.get_base_model().config, "quantization_config", None)
    found = config.get("quant_method") if isinstance(config, dict) else config
    method = getattr(found, "quant_method", found)
    known = find_plugins(ADAPTER_INITIALIZERS)
    if method not in known:
        raise ModelError(
            f"--lora-init loftq needs a model quantized by one of: {', '.join(known) or 'none'}; "
            f"{name!r} is "
            + ("not quantized" if method is None else f"quantized by {str(method)!r}")
        )
    load_plugin(ADAPTER_INITIALIZERS, method)(model, original)


def find_gguf(model: str) -> tuple[str, str | None]:
    """Return the folder (or hub name) and the name of the GGUF file in it, if it is one.

    Raises:
        ModelError: there is no such file, or there are several.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file {model!r}")
        return str(path.parent), path.name
    if path.is_dir() and not any((path / name).exists() for name in ("config.json", ADAPTER_FILE)):
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return model, found[0].name
        if found:
            names = ", ".join(file.name for file in found)
            raise ModelError(f"folder {model!r} has several GGUF files; give one of {names}")
    return model, None


def quantization_method(folder: Path) -> str | None:
    """Return the `quant_method` that a folder's config.json names, if it names one."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        method = (config.get("quantization_config") or {}).get("quant_method")
    except (OSError, ValueError, AttributeError):
        return None
    return method if isinstance(method, str) else None


def adapter_base(folder: Path) -> str:
    """Return the name of the model that an adapter in `folder` was trained on.

    Raises:
        ModelError: it names none.
    """
    file = folder / ADAPTER_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(file)!r} is not JSON: {error}") from error
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(name, str) or not name:
        raise ModelError(f"adapter {str(folder)!r} does not name its base model")
    return name


def require_package(module: str, what: str, package: str) -> None:
    """Import a module; raise ModelError with the way to install it where it is missing."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(f"{what} need the package {package}: pip install {package}") from error


def _loaded(load: Callable[[], Any], model: str, what: str = "model") -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
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


def _adapted(folder: Path, *, dtype: Any, device_map: Any, trust_remote_code: bool) -> Any:
    require_package("peft", "adapters", "peft")
    import peft

    model = open_model(
        adapter_base(folder),
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers by a name that is going away
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True).eval()
