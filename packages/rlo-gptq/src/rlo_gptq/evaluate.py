"""Perplexity by the field's protocol, tasks through lm-eval, and tables of several models."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rlo_core.errors import RLOError
from rlo_core.perplexity import perplexity
from rlo_core.runs import read_run
from rlo_core.text import load_first_split

from rlo_gptq.calibrate import token_ids
from rlo_gptq.checkpoint import load, read_quantization, weight_bytes, weight_files
from rlo_gptq.hf_quantizer import METHOD
from rlo_gptq.importing import import_checkpoint
from rlo_gptq.merge import ADAPTER_FILE, adapter_base, load_adapted
from rlo_gptq.processes import pick_device
from rlo_gptq.settings import LayerSettings
from rlo_gptq.source import find_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_WINDOW = 2048
"""Tokens of a window in the field's tables, for models that allow as many."""


class EvaluationError(RLOError):
    """An evaluation that cannot be done."""


def open_model(
    name: str, *, device: str = "auto", dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Load a model, its tokenizer, and its folder: ours, an adapter of ours, a GPTQ checkpoint, or
    what transformers loads.

    Raises:
        RLOError: it cannot be found or read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind: torch.dtype = getattr(torch, dtype)
    place = {"": pick_device(device)}
    if (Path(name) / ADAPTER_FILE).is_file():
        adapter = Path(name)
        adapted: Any = load_adapted(adapter, dtype=kind, device_map=place)
        return adapted, AutoTokenizer.from_pretrained(adapter_base(adapter)), adapter
    folder = find_model(name)
    method = read_quantization(folder).get("quant_method")
    if method == METHOD:
        model = load(folder, dtype=kind, device_map=place)
    elif method == "gptq":  # transformers would need GPTQModel, and half precision
        with tempfile.TemporaryDirectory(prefix="rlo-gptq-") as scratch:
            ours = import_checkpoint(folder, Path(scratch) / "imported").folder
            model = load(ours, dtype=kind, device_map=place)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, device_map=place)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise EvaluationError(
                f"{name!r} does not load: {' '.join(str(error).split())}"
            ) from error
    model.eval()  # type: ignore[no-untyped-call]
    return model, AutoTokenizer.from_pretrained(folder), folder


def check_model(name: str) -> Path:
    """Return a model's folder, or an adapter's.

    Raises:
        RLOError: there is no such model.
    """
    return Path(name) if (Path(name) / ADAPTER_FILE).is_file() else find_model(name)


def evaluate_perplexity(
    name: str,
    dataset: str,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    split: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Return the perplexity of a model on a text: windows that do not overlap, first tokens unread.

    Args:
        name: A folder or hub name, quantized by us or not.
        dataset: What `load_text` takes; its test split, or its validation split without one.
        context: Tokens of a window; None is the model's length, at most 2048.
        max_tokens: Use only the beginning of the text.
        device: "auto", "cpu", "cuda", ...
        dtype: Of weights that are not packed, and of activations.
        split: Of the data set, if not the test split.
        progress: Called with windows done and windows in all.

    Returns:
        `perplexity`, `ce` (nats per token), `tokens`, `context`, `bytes`, `seconds`, `dataset`, ...
    """
    model, tokenizer, folder = open_model(name, device=device, dtype=dtype)
    data, found = load_first_split(dataset, [split] if split else ["test", "validation"])
    window = _window(model, context)
    begin = time.perf_counter()
    with torch.inference_mode():
        result = perplexity(
            model,
            token_ids(tokenizer, data),
            context=window,
            max_tokens=max_tokens,
            progress=progress,
        )
    return {
        "model": name,
        "dataset": dataset,
        "split": found,
        "fingerprint": data.fingerprint,
        "perplexity": result.perplexity,
        "ce": result.ce,
        "tokens": result.tokens,
        "context": window,
        "bytes": weight_bytes(folder),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _window(model: PreTrainedModel, context: int | None) -> int:
    """Return the tokens of a window.

    Raises:
        EvaluationError: the model has a table of positions, and it is shorter.
    """
    text = model.config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if context is None:
        return min(longest or LONGEST_WINDOW, LONGEST_WINDOW)
    # Rotated positions have no end, and how far they carry is worth measuring.
    if longest and context > longest and not getattr(text, "rope_parameters", None):
        raise EvaluationError(f"context must be at most the model's {longest}, got {context}")
    return context


def check_lm_eval() -> None:
    """Raise EvaluationError with the way out if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(
            "--tasks needs lm-eval; install it with: pip install 'rlo-gptq[lm-eval]'"
        )


def evaluate_tasks(
    name: str,
    tasks: Sequence[str],
    *,
    limit: int | None,
    device: str,
    dtype: str,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Return lm-eval's results for a model: for each task its metrics.

    Args:
        name: A folder or hub name, quantized by us or not.
        tasks: Names of tasks.
        limit: Examples of each task; None for all.
        device: "auto", "cpu", "cuda", ...
        dtype: Of weights that are not packed, and of activations.
        include_path: A folder with YAML files of further tasks.

    Raises:
        EvaluationError: lm-eval is not installed, or a task fails.
    """
    check_lm_eval()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer, _ = open_model(name, device=device, dtype=dtype)
    try:
        results = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=list(tasks),
            limit=limit,
            task_manager=TaskManager(include_path=None if include_path is None else [include_path]),
            bootstrap_iters=0,  # their spread takes minutes and is not asked for
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise EvaluationError(f"lm-eval failed: {' '.join(str(error).split())[:300]}") from error
    found: dict[str, Any] = json.loads(json.dumps(results["results"], default=str))
    return found


def original_of(folder: Path) -> str:
    """Return the name of the model that a checkpoint was made of, from its run.json.

    Raises:
        EvaluationError: it is not known.
    """
    try:
        return str(read_run(folder)["options"]["model"])
    except (RLOError, KeyError) as error:
        raise EvaluationError(
            f"the original of {str(folder)!r} is not known; name it with --original MODEL"
        ) from error


def inspect_model(name: str) -> dict[str, Any]:
    """Return settings, sizes and the layers' errors of a quantized model; reads headers only.

    Raises:
        EvaluationError: the model is not one of ours.
    """
    from safetensors import safe_open

    folder = find_model(name)
    quantization = read_quantization(folder)
    if quantization.get("quant_method") != METHOD:
        raise EvaluationError(f"{name!r} is not quantized by {METHOD}")
    settings = LayerSettings.from_dict(quantization["settings"])
    measured = _measured(folder)
    layers, packed, other = [], 0, 0
    shapes: dict[str, tuple[tuple[int, ...], int]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as stored:
            for tensor in stored.keys():  # noqa: SIM118 - it is no mapping
                part = stored.get_slice(tensor)
                size = _bytes(part.get_shape(), str(part.get_dtype()))
                shapes[tensor] = (tuple(part.get_shape()), size)
    quantized = {tensor.removesuffix(".scales") for tensor in shapes if tensor.endswith(".scales")}
    for layer in sorted(quantized, key=_natural):
        sizes = {t: s for t, (_, s) in shapes.items() if t.rpartition(".")[0] == layer}
        packed += sum(sizes.values())
        rows, groups = shapes[f"{layer}.scales"][0]
        layers.append(
            {
                "layer": layer,
                "rows": rows,
                "groups": groups,
                "bytes": sum(sizes.values()),
                **measured.get(layer, {}),
            }
        )
    other = sum(size for _, size in shapes.values()) - packed
    return {
        "model": name,
        "settings": settings.to_dict(),
        "packed_bytes": packed,
        "other_bytes": other,
        "layers": layers,
    }


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _bytes(shape: Sequence[int], kind: str) -> int:
    size = int("".join(c for c in kind if c.isdigit()) or 8) // 8
    for extent in shape:
        size *= extent
    return size


def _measured(folder: Path) -> dict[str, dict[str, Any]]:
    """Return proxy loss and seconds of each layer, from metrics.jsonl if it is there."""
    from rlo_core.runs import read_metrics

    return {
        record["layer"]: {key: record[key] for key in ("columns", "proxy", "seconds")}
        for record in read_metrics(folder)
        if {"layer", "columns", "proxy", "seconds"} <= set(record)
    }


def compare_models(
    names: Sequence[str],
    dataset: str | None,
    *,
    context: int | None,
    max_tokens: int | None,
    device: str,
    dtype: str,
) -> list[dict[str, Any]]:
    """Return a row for each model: bits, bytes, perplexity on `dataset`, seconds to make it."""
    rows = []
    folders = [check_model(name) for name in names]
    for folder, name in zip(folders, names, strict=True):
        row: dict[str, Any] = {"model": name, **_described(folder)}
        try:
            row["quantize_seconds"] = read_run(folder)["summary"]["seconds"]
        except (RLOError, KeyError):
            row["quantize_seconds"] = None
        if dataset is not None:
            result = evaluate_perplexity(
                name, dataset, context=context, max_tokens=max_tokens, device=device, dtype=dtype
            )
            row |= {key: result[key] for key in ("perplexity", "tokens", "context")}
        rows.append(row)
    return rows


def _described(folder: Path) -> dict[str, Any]:
    """Return bits, method, incoherence and bytes of a model, or of an adapter with its base."""
    if (folder / ADAPTER_FILE).is_file():
        base = _described(adapter_base(folder))
        size = base["bytes"] + weight_bytes(folder)
        return {**base, "method": f"{base['method']} + adapter", "bytes": size}
    found = read_quantization(folder)
    method = found.get("quant_method")
    row: dict[str, Any] = {"bits": found.get("bits"), "method": method or "original"}
    if method == METHOD:
        settings = LayerSettings.from_dict(found["settings"])
        row = {
            "bits": settings.bits,
            "method": settings.method,
            "incoherence": settings.incoherence,
        }
    return {**row, "bytes": weight_bytes(folder)}


def plot_comparison(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw perplexity against size on disk, one labelled point for each model.

    Raises:
        EvaluationError: no perplexities were measured.
    """
    from rlo_core.charts import colours, new_figure, save_picture

    points = [row for row in rows if row.get("perplexity") is not None]
    if not points:
        raise EvaluationError("a plot needs perplexities: give --dataset")
    figure, (axes,) = new_figure(6.4, 4.2)
    colour = colours([str(row["model"]) for row in points])
    for row in points:
        label = Path(str(row["model"])).name
        x, y = row["bytes"] / 1e6, row["perplexity"]
        axes.scatter([x], [y], color=colour[str(row["model"])])
        axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("weight files, MB")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    return save_picture(figure, path)
