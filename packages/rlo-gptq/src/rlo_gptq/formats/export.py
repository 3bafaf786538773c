"""One of our checkpoints as a GPTQ or compressed-tensors checkpoint that other tools read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from rlo_core.files import write_json
from safetensors import safe_open
from torch import Tensor

from rlo_gptq.checkpoint.dense_outside import DenseOutside
from rlo_gptq.checkpoint.digests import check_digests
from rlo_gptq.checkpoint.hf_quantizer import METHOD, RLOGPTQConfig, as_error, module_table
from rlo_gptq.checkpoint.load import read_quantization, weight_files
from rlo_gptq.checkpoint.outside import outside_modules
from rlo_gptq.checkpoint.validation import (
    check_folder,
    check_sizes,
    read_headers,
    read_object,
    weight_paths,
)
from rlo_gptq.formats import compressed
from rlo_gptq.formats.gptq import (
    CheckpointFormat,
    FormatError,
    GridLayer,
    check_widths,
    is_symmetric,
    pack_layer,
)
from rlo_gptq.models.digests import file_digests
from rlo_gptq.models.shards import ShardWriter, new_folder
from rlo_gptq.packed.packing import unpack_codes
from rlo_gptq.rounding.grids import column_groups, symmetric_zero

if TYPE_CHECKING:
    from rlo_gptq.models.layout import Layout
    from rlo_gptq.settings import LayerSettings

ExportFormat = Literal["gptq", "compressed-tensors", "gguf"]
NOTE = "rlo-gptq-export.json"
EXPORT_FORMATS: tuple[str, ...] = get_args(ExportFormat)


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        folder: The new checkpoint.
        format: "gptq", "compressed-tensors" or "gguf".
        checkpoint_format: For GPTQ "gptq" (version 1) or "gptq_v2".
        layers: Quantized layers.
        bytes: Of the weight files.
    """

    folder: Path
    format: str
    checkpoint_format: str | None
    layers: int
    bytes: int


def export_checkpoint(folder: Path, out: Path, *, format: ExportFormat) -> Exported:
    """Write a checkpoint of ours in another format; the shards are converted one at a time.

    Args:
        folder: A folder made by `rlo-gptq quantize`.
        out: The new folder; must not exist, or be empty.
        format: "gptq" writes version 1 where every zero is 2^(bits-1), else version 2; "gguf"
            writes one file, whose blocks hold the codes and scales as they are.

    Raises:
        FormatError: the format cannot hold the checkpoint; nothing is left behind.
        CheckpointError: the checkpoint is damaged.
    """
    if format not in EXPORT_FORMATS:
        raise FormatError(f"format must be one of {', '.join(EXPORT_FORMATS)}, got {format!r}")
    if format == "compressed-tensors":
        compressed.check_library()
    check_folder(folder)
    check_digests(folder)
    found = read_quantization(folder)
    if found.get("quant_method") != METHOD:
        raise FormatError(
            f"{str(folder)!r} must be quantized by {METHOD}, got {found.get('quant_method')!r}"
        )
    checkpoint = Checkpoint(folder, RLOGPTQConfig.from_dict(found))
    _check_settings(checkpoint.settings, experts=checkpoint.config.split_experts)
    _check_one_width(format, checkpoint.settings, checkpoint.config.bits)
    with new_folder(out, FormatError) as partial:
        if format == "gguf":
            from rlo_gptq.formats.gguf.export import write_export

            layers, size = write_export(folder, partial, checkpoint.config)
            return Exported(out, format, None, layers, size)
        version_, layers, size = checkpoint.write(partial, format)
        note = {"checkpoint_format": version_, "layers": layers, "bytes": size}
        origin = file_digests(weight_files(folder))
        write_json(partial / NOTE, {"format": format, **note, "origin": origin})
    return Exported(out, format, version_, layers, size)


def find_export(folder: Path, out: Path) -> Exported | None:
    """Return the export of this very checkpoint that is in `out` already, or None."""
    if not (out / NOTE).is_file():
        return None
    note = read_object(out / NOTE)
    if note.pop("origin", None) != file_digests(weight_files(folder)):
        return None
    return Exported(out, **note)


def check_exportable(
    format: str, settings: LayerSettings, layout: Layout, shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse what a format cannot hold, before anything is quantized.

    Args:
        format: "gptq" or "compressed-tensors".
        settings: Of the layers.
        layout: Of the model.
        shapes: Of each layer to quantize, (out, in), by its full name.

    Raises:
        FormatError: says what to quantize with instead.
    """
    if format == "compressed-tensors":
        compressed.check_library()
    _check_settings(settings, experts=layout.experts)
    _check_one_width(format, settings, layout.bits)
    _check_whole(module_table(layout.linears))
    _check_all(format, settings.group_size, shapes)


def _check_all(format: str, group_size: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse all layers that do not fit at once, with the --skip that would help.

    Raises:
        FormatError: says what is wrong with the first one, and which others do not fit.
    """
    refused: dict[str, FormatError] = {}
    for name, (rows, columns) in shapes.items():
        try:
            _check_groups(name, columns, group_size)
            if format == "gptq":
                check_widths(name, rows, columns)
        except FormatError as error:
            refused[name] = error
    if not refused:
        return
    first = next(iter(refused.values()))
    if len(refused) == 1:
        raise first
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in refused))
    skip = " ".join(f"--skip '*.{kind}'" for kind in kinds)
    if len(refused) == len(shapes):
        raise FormatError(f"{first} (none of the {len(shapes)} layers fits)")
    raise FormatError(
        f"{len(refused)} of {len(shapes)} layers do not fit ({', '.join(kinds)}); first: {first}; "
        f"all would be left out by {skip}"
    )


def _check_settings(settings: LayerSettings, *, experts: bool) -> None:
    if settings.grid != "scalar":
        raise FormatError(f"grid must be scalar to be exported, got {settings.grid!r}")
    if settings.incoherence != "none" or settings.rescale:
        raise FormatError(
            "a model that is rotated or rescaled at run time cannot be exported; quantize with "
            "--rotate fold, which puts the rotation into the weights"
        )
    if settings.sym and not settings.integer_zero:
        zero = symmetric_zero(settings.bits, integer=False)
        raise FormatError(
            f"zeros must be integers to be exported, got {zero}; quantize with --integer-zero"
        )
    if experts:
        raise FormatError(
            "a model with quantized experts cannot be exported, only dense ones; leave the experts "
            "out with --skip '*.experts.*'"
        )


def _check_one_width(format: str, settings: LayerSettings, bits: Mapping[str, int]) -> None:
    """Refuse layers of different bits for GPTQ, whose readers take one number for all."""
    if format != "gptq":
        return
    others = {name: number for name, number in bits.items() if number != settings.bits}
    if others:
        name = min(others)
        raise FormatError(
            f"layers must share one number of bits in the GPTQ format, got {settings.bits} and "
            f"{others[name]} (layer {name!r}); export to compressed-tensors, or quantize without "
            "--bits, --bytes and --average-bits"
        )


def _check_groups(name: str, columns: int, size: int) -> None:
    if size > 0 and columns % size:
        raise FormatError(
            f"layer {name!r}: its input width must be a multiple of the group size {size}, "
            f"got {columns}; quantize with another --groupsize, or leave the layer out "
            f"with --skip '*.{name.rpartition('.')[2]}'"
        )


def _check_whole(modules: Mapping[str, list[int] | None]) -> None:
    partial = [name for name, blocks in modules.items() if blocks is not None]
    if partial:
        raise FormatError(
            "layers must be quantized in all blocks or in none to be exported, "
            f"got {partial[0]!r} in some"
        )


class Checkpoint:
    """A folder of ours, read layer by layer."""

    def __init__(self, folder: Path, config: RLOGPTQConfig) -> None:
        self.folder = folder
        self.config = config
        self.settings = config.layer_settings
        self.model_config = read_object(folder / "config.json")
        check_sizes(self.model_config, read_headers(weight_paths(folder)))
        self.widths = linear_widths(folder)
        self.dtype: torch.dtype = getattr(torch, str(self.model_config.get("dtype") or "float16"))

    def shards(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the weight files' names and tensors, embedding and head dense."""
        outside = DenseOutside(outside_modules(self.config.outside), self.dtype)
        for path in weight_paths(self.folder):
            with safe_open(path, framework="pt") as stored:
                keys = list(stored.keys())
                yield path.name, outside.unpacked({key: stored.get_tensor(key) for key in keys})

    def layer(self, name: str, tensors: Mapping[str, Tensor]) -> GridLayer:
        """Return one layer from its tensors."""
        inside = name.removeprefix(f"{self.config.blocks}.")
        bits = self.config.bits.get(inside, self.settings.bits)
        scales = tensors[f"{name}.scales"].float()
        columns = self.widths[name]
        _check_groups(name, columns, self.settings.group_size)
        if f"{name}.zeros" in tensors:
            zeros = tensors[f"{name}.zeros"].float()
        else:
            zeros = torch.full_like(scales, symmetric_zero(bits, integer=True))
        group_of = column_groups(columns, self.settings.group_size)
        codes = unpack_codes(tensors[f"{name}.weight"], bits, columns)
        if f"{name}.order" in tensors:  # each column back to its input, and its group with it
            back = torch.argsort(tensors[f"{name}.order"])
            codes, group_of = codes[:, back], group_of[back]
        return GridLayer(codes, scales, zeros, group_of, bits)

    def write(self, out: Path, format: ExportFormat) -> tuple[CheckpointFormat | None, int, int]:
        """Write shards, index and configuration; return the GPTQ version, layers and bytes."""
        symmetric = self._all_symmetric()
        version_: CheckpointFormat | None = None
        if format == "gptq":
            version_ = "gptq" if symmetric else "gptq_v2"
        writer, layers = ShardWriter(out), 0
        dtype = self.dtype
        for file, tensors in self.shards():
            names = _layers_in(tensors)
            new = {
                key: tensor
                for key, tensor in tensors.items()
                if key.rpartition(".")[0] not in names or key.endswith(".bias")
            }
            for name in names:
                layer = self.layer(name, tensors)
                packed = (
                    pack_layer(name, layer, version_)
                    if version_ is not None
                    else compressed.pack_layer(name, layer, symmetric=symmetric, dtype=dtype)
                )
                new.update({f"{name}.{key}": tensor for key, tensor in packed.items()})
            writer.add(file, new)
            layers += len(names)
        quantization = self._quantization(version_, symmetric=symmetric)
        if version_ is not None:  # for old readers
            write_json(out / "quantize_config.json", quantization)
        config = {**self.model_config, "quantization_config": quantization}
        return version_, layers, writer.finish(config, texts=self.folder)

    def _all_symmetric(self) -> bool:
        if self.settings.sym:
            return True
        return all(
            is_symmetric(self.layer(name, tensors))
            for _, tensors in self.shards()
            for name in _layers_in(tensors)
        )

    def _quantization(
        self, version_: CheckpointFormat | None, *, symmetric: bool
    ) -> dict[str, Any]:
        settings = self.settings
        skipped = self._skipped()
        group_size = settings.group_size if settings.group_size > 0 else -1
        if version_ is None:
            return compressed.quantization_config(
                bits=settings.bits,
                group_size=group_size,
                symmetric=symmetric,
                ignore=skipped,
                others=self._others(),
            )
        return gptq_config(
            bits=settings.bits,
            group_size=group_size,
            symmetric=symmetric,
            checkpoint_format=version_,
            percdamp=settings.percdamp,
            permuted=self.config.permuted,
            quantized=list(self.config.modules) if len(skipped) > 1 else None,
            skipped=[name for name in skipped if name != "lm_head"],
        )

    def _others(self) -> dict[int, list[str]]:
        """Return patterns of the layers that do not have the settings' bits."""
        found: dict[int, dict[str, list[int]]] = {}
        for name, bits in self.config.bits.items():
            index, _, inside = name.partition(".")
            if bits != self.settings.bits:
                found.setdefault(bits, {}).setdefault(inside, []).append(int(index))
        blocks = re.escape(self.config.blocks)
        return {
            bits: [
                rf"re:^{blocks}\.({'|'.join(map(str, sorted(at)))})\.{re.escape(inside)}$"
                for inside, at in sorted(names.items())
            ]
            for bits, names in sorted(found.items())
        }

    def _skipped(self) -> list[str]:
        """Return the names of the linear layers that are not quantized, the head among them."""
        quantized = set(self.config.modules)
        _check_whole(self.config.modules)
        prefix = f"{self.config.blocks}."
        inside = {
            n.removeprefix(prefix).partition(".")[2] for n in self.widths if n.startswith(prefix)
        }
        left = sorted(inside - quantized)
        return [
            "lm_head",
            *(name for name in self.widths if name.startswith(prefix) and _ends(name, left)),
        ]


def _ends(name: str, endings: Sequence[str]) -> bool:
    return any(name.endswith(f".{ending}") for ending in endings)


def linear_widths(folder: Path) -> dict[str, int]:
    """Return the input width of every linear layer of the model's class, from an empty model."""
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        config.__dict__.pop("quantization_config", None)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # a hostile config.json provokes any of them
        raise as_error(error) from error
    return {n: m.in_features for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def _layers_in(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the quantized layers whose tensors are there."""
    return sorted(key.removesuffix(".scales") for key in tensors if key.endswith(".scales"))


def gptq_config(
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    checkpoint_format: CheckpointFormat,
    percdamp: float,
    permuted: bool,
    quantized: Sequence[str] | None,
    skipped: Sequence[str],
) -> dict[str, Any]:
    """Return the `quantization_config` of a GPTQ checkpoint, also its `quantize_config.json`.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: -1 for one group per row.
        symmetric: Whether all zeros are 2^(bits-1).
        checkpoint_format: "gptq" or "gptq_v2".
        percdamp: Damping, as a fraction.
        permuted: Whether groups are not runs of columns, as after act-order.
        quantized: Names inside a block of the quantized layers, if some are left out.
        skipped: Full names of the layers inside the blocks that are left out.
    """
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": permuted,
        "sym": symmetric,
        "true_sequential": True,
        "damp_percent": min(max(percdamp, 1e-6), 0.99),
        "lm_head": False,
        "pack_dtype": "int32",
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "meta": {"quantizer": [f"rlo-gptq:{version('rlo-gptq')}"]},
    }
    if quantized is not None:  # transformers reads the first, GPTQModel the second
        config["modules_in_block_to_quantize"] = [[name] for name in quantized]
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in skipped}
    return config
