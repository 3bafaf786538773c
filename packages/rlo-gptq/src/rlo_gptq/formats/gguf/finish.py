"""The GGUF file of a model: of the finished parts of a run, or of a model as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rlo_core.files import write_text
from safetensors import safe_open
from torch import Tensor

from rlo_gptq.formats.gguf.architecture import (
    Architecture,
    architecture_of,
    hyperparameters,
    rope_factors,
    rows_of,
    tensor_name,
)
from rlo_gptq.formats.gguf.round import nearest_blocks
from rlo_gptq.formats.gguf.tokenizer import tokenizer_metadata
from rlo_gptq.formats.gguf.types import BLOCK_TYPES, FILE_TYPES, GGUFError, Mixture
from rlo_gptq.formats.gguf.writer import (
    Entry,
    check_library,
    copied_metadata,
    file_bytes,
    write_file,
)
from rlo_gptq.models.fold import folded_config

if TYPE_CHECKING:
    from rlo_gptq.models.layout import Layout
    from rlo_gptq.models.source import ModelSource
    from rlo_gptq.options import Options
    from rlo_gptq.pipeline.work_folder import WorkFolder

_QUANTIZATION_VERSION = 2  # of the block layouts, llama.cpp's GGML_QNT_VERSION


def mixture_of(source: ModelSource, name: str) -> Mixture:
    """Return which type each tensor of a model gets in a file of the type `name`."""
    config = source.config.to_dict()
    heads = int(config["num_attention_heads"])
    return Mixture(
        name,
        blocks=int(config["num_hidden_layers"]),
        heads_per_group=heads // int(config.get("num_key_value_heads") or heads),
        tied=not has_own_head(source),
    )


def has_own_head(source: ModelSource) -> bool:
    """Return whether the head is a tensor of its own, not the embedding."""
    tied = set(source.model.all_tied_weights_keys)
    return "lm_head.weight" not in tied and bool(source.targets(lambda n: n == "lm_head.weight"))


def gguf_origin(model: str) -> Path | None:
    """Return the GGUF file that a model's name stands for, or None: see `find_model`."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_dir() and not list(path.glob("*.safetensors")) and not list(path.glob("*.bin")):
        files = sorted(path.glob("*.gguf"))
        return files[0] if len(files) == 1 else None
    return None


def check_writable(
    source: ModelSource,
    layout: Layout,
    shapes: Mapping[str, tuple[int, int]],
    options: Options,
) -> None:
    """Refuse what a GGUF file cannot hold, before anything is quantized.

    Args:
        source: The model.
        layout: Of its blocks.
        shapes: Of each layer to quantize, (out, in), by its full name.
        options: With the type of the file.

    Raises:
        GGUFError: says what does not fit, everything at once, and what would.
    """
    check_library()
    assert options.gguf is not None
    config = source.config.to_dict()
    architecture = architecture_of(config)
    if layout.experts:
        raise GGUFError("--format gguf takes dense models, got one with experts")
    for name in _stored_names(source):
        tensor_name(architecture, name)
    mixture = mixture_of(source, options.gguf)
    kinds = {
        name: mixture.of(tensor_name(architecture, f"{name}.weight"), columns)
        for name, (_, columns) in shapes.items()
    }
    left = sorted({name.rpartition(".")[2] for name, kind in kinds.items() if kind == "F16"})
    if kinds and all(kind == "F16" for kind in kinds.values()):
        widths = sorted({columns for _, columns in shapes.values()})
        raise GGUFError(
            f"GGUF blocks hold 32 or 256 weights of a row, and no layer's width is a multiple of "
            f"32: {', '.join(left)} have {', '.join(map(str, widths))}"
        )
    if gguf_origin(options.model) is None:
        tokenizer_metadata(source.folder, int(config["vocab_size"]))


def file_name(model: str, name: str) -> str:
    """Return the name of the file, e.g. "SmolLM2-135M-Q4_K_M.gguf"."""
    stem = Path(model.rstrip("/")).name
    stem = stem.removesuffix(".gguf")
    for kind in sorted(FILE_TYPES, key=len, reverse=True):  # of the source
        for sign in (".", "-", "_"):
            stem = stem.removesuffix(f"{sign}{kind}").removesuffix(f"{sign}{kind.lower()}")
    return f"{stem}-{name}.gguf"


def write_gguf(
    work: WorkFolder, source: ModelSource, layout: Layout, options: Options, *, base: str
) -> None:
    """Make the file of the finished parts, which stay until the run's report is written.

    Args:
        work: With all parts.
        source: The original model.
        layout: Its blocks.
        options: Of the run.
        base: The original model's name.
    """
    assert options.gguf is not None
    packed = set(layout.names())
    parts = [work.part("rest")] + [work.part(f"block-{i:05d}") for i in range(layout.count)]
    loads: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        with safe_open(part, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - it is no mapping
                loads[key] = partial(_tensor, part, key)
                shapes[key] = tuple(stored.get_slice(key).get_shape())
    for name in packed:
        linear = source.model.get_submodule(name)
        shapes[f"{name}.weight"] = (int(linear.out_features), int(linear.in_features))  # type: ignore[arg-type]
    path = work.folder / file_name(base, options.gguf)
    writer = file_of(source, options.gguf, origin=gguf_origin(options.model))
    size = writer.write(path, shapes, loads, packed=packed, base=base)
    write_text(work.folder / "README.md", _card(path.name, base, options, size, writer.kinds))


def write_dense(source: ModelSource, path: Path, *, kind: str, base: str) -> int:
    """Write a model as it is, unquantized or rounded to nearest; returns the file's bytes.

    Args:
        source: The model.
        path: Of the file.
        kind: A key of `FILE_TYPES`.
        base: The model's name.
    """
    names = _stored_names(source)
    shapes = {name: tuple(source.model.state_dict()[name].shape) for name in names}

    def load(name: str) -> Tensor:
        source.load(lambda target: target == name)
        found: Tensor = source.model.state_dict()[name].detach().clone()
        module, _, part = name.rpartition(".")
        empty = torch.nn.Parameter(torch.empty_like(found, device="meta"), requires_grad=False)
        setattr(source.model.get_submodule(module), part, empty)
        return found

    loads = {name: partial(load, name) for name in names}
    return file_of(source, kind, origin=None).write(path, shapes, loads, packed=set(), base=base)


def planned_file(
    source: ModelSource, layout: Layout, options: Options, *, base: str, folded: bool
) -> dict[str, Any]:
    """Return the size of the file that a run makes, to the byte, and the types in it.

    Args:
        source: The model, before rotations are folded.
        layout: Its blocks.
        options: Of the run.
        base: The model's name.
        folded: Whether a tied head becomes one of its own, by `--rotate fold`.
    """
    assert options.gguf is not None
    check_library()
    config = source.config.to_dict()
    state = source.model.state_dict()
    shapes = {name: tuple(state[name].shape) for name in _stored_names(source)}
    mixture = mixture_of(source, options.gguf)
    if folded:
        config, mixture = folded_config(config), replace(mixture, tied=False)
        shapes["lm_head.weight"] = tuple(state["lm_head.weight"].shape)
    writer = FileOf(
        config,
        source.folder,
        mixture.of,
        kind=options.gguf,
        origin=gguf_origin(options.model),
        stored=source.in_file,
    )
    size = writer.bytes(shapes, packed=set(layout.names()), base=base)
    counts = Counter(writer.kinds.values())
    return {"gguf_bytes": size, "types": ", ".join(f"{n} x {k}" for k, n in sorted(counts.items()))}


def _nothing() -> Tensor:
    return torch.empty(0)


def _stored_names(source: ModelSource) -> list[str]:
    tied = set() if has_own_head(source) else {"lm_head.weight"}
    return source.targets(lambda name: name not in tied)


def _tensor(part: Path, key: str) -> Tensor:
    with safe_open(part, framework="pt") as stored:
        tensor: Tensor = stored.get_tensor(key)
    return tensor


def file_of(source: ModelSource, kind: str, *, origin: Path | None) -> FileOf:
    """Return the file of a model that is not quantized yet."""
    return FileOf(
        source.config.to_dict(),
        source.folder,
        mixture_of(source, kind).of,
        kind=kind,
        origin=origin,
        stored=source.in_file,
    )


class FileOf:
    """The entries and metadata of one model's file.

    Args:
        config: The model's `config.json`.
        folder: With its tokenizer.
        kind_of: Returns the type of a matrix from llama.cpp's name and the columns.
        kind: Of the file, a key of `FILE_TYPES`.
        origin: A GGUF file whose metadata is copied.
        stored: Types in which dense tensors were stored, by their names.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: Path,
        kind_of: Callable[[str, int], str],
        *,
        kind: str,
        origin: Path | None,
        stored: Mapping[str, torch.dtype],
    ) -> None:
        self.kind, self.origin, self.kind_of = kind, origin, kind_of
        self.config, self.folder, self.stored = config, folder, stored
        self.architecture: Architecture = architecture_of(config)
        self.kinds: dict[str, str] = {}

    def write(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        loads: Mapping[str, Callable[[], Tensor]],
        *,
        packed: set[str],
        base: str,
    ) -> int:
        entries = self.entries(shapes, loads, packed=packed)
        return write_file(path, self.architecture.name, self._metadata(base, shapes), entries)

    def bytes(self, shapes: Mapping[str, tuple[int, ...]], *, packed: set[str], base: str) -> int:
        """Return the size of the file that `write` makes; loads no tensor."""
        entries = self.entries(shapes, dict.fromkeys(shapes, _nothing), packed=packed)
        return file_bytes(self.architecture.name, self._metadata(base, shapes), entries)

    def entries(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        loads: Mapping[str, Callable[[], Tensor]],
        *,
        packed: set[str],
    ) -> list[Entry]:
        """Return the tensors of the file, in its order."""
        entries = [
            self._entry(name, shapes[name], loads[name], packed=name.rpartition(".")[0] in packed)
            for name in sorted(loads, key=_place)
        ]
        factors = self._factors()
        if factors is not None:
            entries.insert(
                0, Entry("rope_freqs.weight", tuple(factors.shape), "F32", lambda: factors)
            )
        self.kinds = {entry.name: entry.kind for entry in entries}
        return entries

    def _entry(
        self, name: str, shape: tuple[int, ...], load: Callable[[], Tensor], *, packed: bool
    ) -> Entry:
        to = tensor_name(self.architecture, name)
        matrix = len(shape) == 2 and name.endswith(".weight")
        inside = to.startswith("blk.")
        if not matrix:
            kind = "F32"
        elif packed or not inside or self.kind in ("F32", "F16", "BF16"):
            kind = self.kind_of(to, shape[1])
        else:  # left out by --skip
            kind = "BF16" if self.stored.get(name) == torch.bfloat16 else "F16"
        norm = not matrix and name.endswith("norm.weight")
        offset = self.architecture.gain_offset if norm else 0.0
        rows = rows_of(self.architecture, name, self.config)

        def loaded() -> Tensor:
            tensor = load()
            if packed and matrix and kind not in BLOCK_TYPES:
                tensor = tensor.view(torch.float16)
            if not packed and kind in BLOCK_TYPES:
                tensor = nearest_blocks(tensor, BLOCK_TYPES[kind])
            if offset:
                tensor = tensor.to(torch.float32) + offset
            return tensor if rows is None else tensor[rows]

        return Entry(to, shape, kind, loaded)

    def _factors(self) -> Tensor | None:
        if self.origin is None:
            return rope_factors(self.config)
        import gguf

        for tensor in gguf.GGUFReader(self.origin).tensors:
            if tensor.name == "rope_freqs.weight":
                return torch.tensor(tensor.data.copy(), dtype=torch.float32)
        return None

    def _metadata(
        self, base: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[str, Any]]:
        count = sum(torch.Size(shape).numel() for shape in shapes.values())
        found: dict[str, tuple[str, Any]] = {
            "general.type": ("string", "model"),
            "general.name": ("string", Path(base.rstrip("/")).name),
            "general.size_label": ("string", _size_label(count)),
        }
        if self.origin is None:
            for key, value in hyperparameters(self.config).items():
                found[f"{self.architecture.name}.{key}"] = value
            vocabulary = int(self.config["vocab_size"])
            found.update(tokenizer_metadata(self.folder, vocabulary))
        else:
            for key, value, kind, element in copied_metadata(self.origin):
                found[key] = (_type_name(kind, element), value)
        found["general.file_type"] = ("uint32", FILE_TYPES[self.kind])
        found["general.quantization_version"] = ("uint32", _QUANTIZATION_VERSION)
        found["general.quantized_by"] = ("string", f"rlo-gptq {version('rlo-gptq')}")
        return found


def _place(name: str) -> tuple[int, int, str]:
    """Order: embedding, blocks by number, the rest."""
    inside = name.partition("model.layers.")[2]
    if inside:
        return 1, int(inside.partition(".")[0]), name
    return (0 if "embed" in name else 2), 0, name


def _type_name(kind: Any, element: Any) -> str:
    """Return the name by which `write_file` knows a value type of the package gguf."""
    name = str(kind.name).lower()
    return f"{str(element.name).lower()}s" if name == "array" else name


def _size_label(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count / 1e3:.3g}K"


def _card(file: str, base: str, options: Options, size: int, kinds: Mapping[str, str]) -> str:
    counts: dict[str, int] = {}
    for kind in kinds.values():
        counts[kind] = counts.get(kind, 0) + 1
    listed = ", ".join(f"{n} x {kind}" for kind, n in sorted(counts.items()))
    rotated = ", random rotations folded into the weights" if options.rotate else ""
    return (
        f"# {file}\n\n"
        f"{base} as a GGUF file of type {options.gguf}, {size / 1e6:.1f} MB: {listed}.\n"
        f"Rounded by {options.layer.method} onto the type's own grid with rlo-gptq "
        f"{version('rlo-gptq')}, calibrated on {options.dataset}{rotated}.\n\n"
        f"    llama-cli -m {file}\n"
    )
