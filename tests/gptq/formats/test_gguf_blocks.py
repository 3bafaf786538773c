"""GGUF's block types: grids, packers and mixtures, held against the package gguf and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rlo_gptq.formats.gguf.blocks import pack_blocks, unpack_blocks
from rlo_gptq.formats.gguf.fit import fit_blocks
from rlo_gptq.formats.gguf.grids import BlockGrid
from rlo_gptq.formats.gguf.round import nearest_blocks, round_to_blocks
from rlo_gptq.formats.gguf.types import (
    BLOCK_TYPES,
    FILE_TYPES,
    QUANTIZED_TYPES,
    BlockType,
    GGUFError,
    Mixture,
    file_type,
)
from rlo_gptq.rounding.layer import proxy_loss
from rlo_gptq.settings import LayerSettings
from rlo_gptq.synthetic import make_layer
from torch import Tensor

gguf = pytest.importorskip("gguf")

KINDS = pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=list(BLOCK_TYPES))


def drawn(kind: BlockType, m: int = 5, blocks: int = 2) -> tuple[Tensor, BlockGrid]:
    """Codes and a grid of which every part is drawn at random over its whole range."""
    d, subs = blocks * kind.columns, blocks * kind.columns // kind.group
    low, high = kind.subs
    sub = torch.randint(low, high + 1, (subs, m)).float()
    if not kind.two_level:
        sub = torch.where(sub < 0, -1.0, 1.0)
    mins = torch.randint(0, kind.mins + 1, (subs, m)).float()
    if kind.mins == 1:
        mins = torch.ones_like(mins)
    scales = (torch.rand(blocks, m) + 0.01).half().float()
    offsets = torch.rand(blocks, m).half().float() if kind.mins else torch.zeros(blocks, m)
    codes = torch.randint(0, kind.top + 1, (d, m)).float()
    return codes, BlockGrid(kind, scales, sub, offsets, mins)


@KINDS
def test_any_codes_and_scales_come_back_from_the_bytes_to_the_bit(kind: BlockType) -> None:
    codes, grid = drawn(kind)
    packed = pack_blocks(codes, grid)
    assert packed.shape == (5, 2 * kind.size)
    values = grid.values(codes, torch.arange(len(codes)))
    assert torch.equal(unpack_blocks(packed, kind), values.T)


@KINDS
def test_a_block_type_has_the_size_and_columns_that_gguf_knows(kind: BlockType) -> None:
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
    assert (kind.columns, kind.size) == (columns, size)


def test_a_file_type_has_gguf_s_number() -> None:
    for name, number in FILE_TYPES.items():
        prefix = "ALL_" if name == "F32" else "MOSTLY_"
        assert gguf.LlamaFileType[prefix + name] == number


@KINDS
def test_the_nearest_code_is_the_nearest_of_all_values(kind: BlockType) -> None:
    _, grid = drawn(kind, m=3, blocks=1)
    d = kind.columns
    x = 2 * torch.randn(d, 3) * grid.steps.abs().max()
    every = torch.arange(kind.top + 1.0)
    columns = torch.arange(d)
    values = torch.stack([grid.values(torch.full((d, 3), c), columns) for c in every.tolist()])
    best = (values - x).abs().amin(0)
    found = grid.values(grid.round_all(x), columns)
    assert torch.allclose((found - x).abs(), best, rtol=1e-5, atol=1e-6)
    code, value = torch.empty(3), torch.empty(3)
    for j in (0, d // 2, d - 1):
        grid.round_column(x[j], j, code, value)
        assert torch.equal(code, grid.round_all(x)[j])
        assert torch.allclose(value, found[j])


@KINDS
def test_a_fitted_grid_is_better_than_the_largest_value_s(kind: BlockType) -> None:
    """Scaling each sub-block by its extremes is what the package gguf does."""
    x = torch.randn(256, 24) * torch.rand(1, 24)
    grid = fit_blocks(x, torch.ones(256), kind)
    error = (grid.values(grid.round_all(x), torch.arange(256)) - x).square().sum()
    parts = x.view(-1, kind.group, 24)
    if kind.mins:
        low, high = parts.amin(1), parts.amax(1)
    else:
        high = parts.abs().amax(1)
        low = -high
    step = ((high - low) / kind.top)[:, None]
    plain = ((parts - low[:, None]) / step).round() * step + low[:, None]
    bound = (plain - parts).square().sum()
    # Integer sub-scales and unsigned minima cost a little at 5 and 6 bits.
    assert error < bound * (1.0 if kind.top < 31 else 1.1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rounding_to_nearest_is_better_than_gguf_s_own(kind: str) -> None:
    x = torch.randn(40, 128)
    number = gguf.GGMLQuantizationType[kind]
    theirs = torch.tensor(gguf.dequantize(gguf.quantize(x.numpy(), number), number))
    ours = unpack_blocks(nearest_blocks(x, BLOCK_TYPES[kind]), BLOCK_TYPES[kind])
    assert (ours - x).square().sum() < 0.95 * (theirs - x).square().sum()


def test_weights_that_are_on_a_grid_already_stay_as_they_are() -> None:
    kind = gguf.GGMLQuantizationType.Q4_1
    x = torch.tensor(gguf.dequantize(gguf.quantize(np.random.randn(8, 64), kind), kind))
    again = unpack_blocks(nearest_blocks(x, BLOCK_TYPES["Q4_1"]), BLOCK_TYPES["Q4_1"])
    assert (again - x).abs().max() < 2e-3 * x.abs().max()


@KINDS
def test_feedback_and_greedy_passes_lower_the_loss_on_a_type_s_own_grid(kind: BlockType) -> None:
    weight, hessian = make_layer(16, 256, seed=0)
    losses = {}
    for method in ("nearest", "gptq", "ldlqRG"):
        settings = LayerSettings(bits=4, method=method, percdamp=0.01)  # type: ignore[arg-type]
        rounded = round_to_blocks(weight, hessian, kind, settings, seed=0)
        values = unpack_blocks(rounded.packed, kind)
        assert proxy_loss(weight, values, hessian) == pytest.approx(rounded.proxy, rel=1e-3)
        losses[method] = rounded.proxy
    assert losses["ldlqRG"] < losses["gptq"] < losses["nearest"]


def test_many_outputs_are_rounded_in_parts_that_join(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = make_layer(24, 256, seed=0)
    settings = LayerSettings(bits=4)
    kind = BLOCK_TYPES["Q4_K"]
    whole = round_to_blocks(weight, hessian, kind, settings, seed=0)
    monkeypatch.setattr("rlo_gptq.rounding.methods.OUTPUTS", (10, 10))
    parts = round_to_blocks(weight, hessian, kind, settings, seed=0)
    assert (parts.packed == whole.packed).float().mean() > 0.99
    assert parts.proxy == pytest.approx(whole.proxy, rel=1e-3)


def test_a_width_that_no_block_divides_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 256 columns for Q4_K, got 96"):
        round_to_blocks(
            torch.zeros(2, 96), torch.eye(96), BLOCK_TYPES["Q4_K"], LayerSettings(), seed=0
        )


@pytest.mark.parametrize(
    ("name", "tensor", "columns", "kind"),
    [
        ("Q4_K_M", "blk.0.attn_v.weight", 4096, "Q6_K"),
        ("Q4_K_M", "blk.4.attn_v.weight", 4096, "Q4_K"),
        ("Q4_K_M", "blk.6.ffn_down.weight", 4096, "Q6_K"),
        ("Q4_K_S", "blk.3.attn_v.weight", 4096, "Q5_K"),
        ("Q3_K_M", "blk.9.attn_output.weight", 4096, "Q4_K"),
        ("Q2_K", "blk.9.attn_v.weight", 4096, "Q4_K"),
        ("Q2_K", "blk.9.ffn_down.weight", 4096, "Q3_K"),
        ("Q4_0", "blk.1.ffn_down.weight", 4096, "Q4_1"),
        ("Q4_0", "blk.9.ffn_down.weight", 4096, "Q4_0"),
        ("Q4_0", "output.weight", 4096, "Q6_K"),
        ("Q8_0", "output.weight", 4096, "Q8_0"),
        ("Q4_K_M", "token_embd.weight", 4096, "Q4_K"),
        ("Q4_K_M", "blk.9.attn_q.weight", 576, "Q5_0"),
        ("Q6_K", "blk.9.attn_q.weight", 576, "Q8_0"),
        ("Q4_0", "blk.9.attn_q.weight", 172, "F16"),
    ],
)
def test_a_mixture_chooses_as_llama_cpp_does(
    name: str, tensor: str, columns: int, kind: str
) -> None:
    mixture = Mixture(name, blocks=32, heads_per_group=4, tied=False)
    assert mixture.of(tensor, columns) == kind


def test_a_tied_embedding_gets_the_type_of_the_head() -> None:
    assert Mixture("Q4_K_M", 16, 4, tied=True).of("token_embd.weight", 2048) == "Q6_K"


def test_short_and_lower_case_names_are_llama_cpp_s_and_unknown_ones_are_refused() -> None:
    assert file_type("q4_k") == "Q4_K_M"
    assert all(file_type(name) == name for name in QUANTIZED_TYPES)
    with pytest.raises(GGUFError, match=r"unknown GGUF type 'Q4_KM'; did you mean Q4_K_M\?"):
        file_type("Q4_KM")
