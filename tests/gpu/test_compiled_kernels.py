"""Every Triton kernel compiled for real GPUs, with the arguments of its launch sites.

No stack, no spilled register, no local memory and no float64; a ceiling of registers for each
kernel; loads of 16 bytes and instructions per weight where the design promises them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

import gpu_aot
from gpu_aot import Launch, Measured
from rlo_core.linear import triton_kernels as rows
from rlo_core.linear.link_codes import Exponential
from rlo_gptq.packed import matmul_kernel as packed
from rlo_gptq.packed.packing import packed_words
from rlo_gptq.rounding import triton_kernels as rounding
from rlo_gptq.rounding.grids import ScalarGrid

FAST = "sm_90"
OTHERS = [target for target in gpu_aot.TARGETS if target != FAST]
# As the compiler gives them, with room for its next version. gfx942 has 512.
REGISTERS = {
    "_statistics_kernel": 64,
    "_spread_kernel": 128,
    "_gradient_kernel": 128,
    "_prepare_kernel": 40,
    "_vector_kernel": 255,
    "_stream_kernel": 168,
    "_trellis_kernel": 216,
    "_feedback_kernel": 255,
    "_greedy_kernel": 255,
}
INSTRUCTIONS_PER_WEIGHT = 0.4
"""Of a warp, for one row of inputs."""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def tile_of_logits(dtype: torch.dtype, classes: int, smoothed: bool, cap: float | None) -> None:
    tile = empty(4096, -(-classes // 16) * 16, dtype=dtype)[:, :classes]
    target = empty(4096, dtype=torch.int64)
    link = Exponential(0.0, -5.0, 0.2)
    rows.statistics_rows(
        tile, target, empty(4, 4096), first=8192, softcap=cap, ignore_index=-100, with_sum=smoothed
    )
    if smoothed:
        rows.spread_rows(
            tile, target, empty(2, 4096), empty(2, 4096), link, softcap=cap, ignore_index=-100
        )
    numbers = empty(6 if smoothed else 4, 4096)
    rows.gradient_rows(tile, target, numbers, link, first=8192, softcap=cap, ignore_index=-100)


def product(
    bits: int, n: int, group_size: int, dtype: torch.dtype = torch.bfloat16, trellis: bool = False
) -> None:
    m = d = 4096
    groups = 1 if group_size < 1 else d // group_size
    tables = (empty(1024), empty(5, m, dtype=torch.int32)) if trellis else None
    packed.packed_matmul(
        empty(n, d, dtype=dtype),
        empty(m, packed_words(d, bits), dtype=torch.int32),
        empty(m, groups, dtype=torch.float16),
        empty(m, groups, dtype=torch.float16) if bits in (4, 5) else 1.5,
        bits=bits,
        group_size=group_size,
        bias=empty(m, dtype=dtype) if bits == 4 else None,
        trellis=tables,
    )


def block_of_columns(columns: int) -> None:
    m = 4096
    grid = ScalarGrid(empty(32, m), empty(32, m), 4, torch.zeros(columns, dtype=torch.long))
    part, square = empty(columns, m), empty(columns, 4096)[:, :columns]
    groups = empty(columns, dtype=torch.int32)
    codes, errors = empty(columns, m), empty(columns, m)
    rounding.feedback_block(part, empty(columns, m), square, codes, errors, grid, groups)
    rounding.greedy_block(
        part, empty(columns, m), square, codes, errors, grid, groups, empty(columns)
    )


HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
SITES: dict[str, Callable[[], None]] = {
    "rows bfloat16": lambda: tile_of_logits(BFLOAT, 8192, False, None),
    "rows bfloat16 smoothed capped": lambda: tile_of_logits(BFLOAT, 8192, True, 30.0),
    "product 2 bits 1 row": lambda: product(2, 1, 128),
    "product 3 bits 1 row": lambda: product(3, 1, 128),
    "product 4 bits 1 row": lambda: product(4, 1, 128),
    "block of 128": lambda: block_of_columns(128),
}
MORE: dict[str, Callable[[], None]] = {
    "rows float16 odd": lambda: tile_of_logits(HALF, 5001, False, None),
    "rows float32 smoothed": lambda: tile_of_logits(FLOAT, 8192, True, None),
    "product 2 bits 16 rows": lambda: product(2, 16, 128),
    "product 2 bits one group": lambda: product(2, 1, -1, HALF),
    "product 2 bits groups of 32": lambda: product(2, 1, 32),
    "product 3 bits 4 rows": lambda: product(3, 4, 128, HALF),
    "product 4 bits 4 rows float32": lambda: product(4, 4, 128, FLOAT),
    "product 5 bits 1 row": lambda: product(5, 1, 128),
    "product 6 bits 2 rows": lambda: product(6, 2, -1),
    "product 8 bits 1 row": lambda: product(8, 1, 128),
    "product trellis 1 row": lambda: product(2, 1, -1, BFLOAT, trellis=True),
    "product trellis 4 rows": lambda: product(2, 4, 128, HALF, trellis=True),
    "block of 64": lambda: block_of_columns(64),
}


def compiled(site: Callable[[], None], target: str) -> list[tuple[Launch, Measured]]:
    with gpu_aot.recorded(rows, packed, rounding) as launches:
        site()
    return [(x, gpu_aot.measured(gpu_aot.build(x, target), target)) for x in launches]


def weights_of_a_lane(launch: Launch) -> int:
    """Weights that a thread multiplies in one round of its loop."""
    a = launch.arguments
    bits = a["BITS"]
    codes = 32 if 32 % bits else 32 // bits * a["VECTOR"]
    return a["OUTPUTS"] * codes * a["LANES"] // (32 * launch.options["num_warps"])


def check(site: Callable[[], None], target: str) -> None:
    found = compiled(site, target)
    assert found
    for launch, code in found:
        name = launch.kernel.__name__
        assert code.spilled == 0, (name, code.registers, code.spilled)
        assert code.float64 == 0, name
        assert code.registers <= (512 if target == "gfx942" else REGISTERS[name]), (
            name,
            code.registers,
        )
        if target == "gfx942":
            continue
        divisible = launch.arguments.get("columns", 16) % 16 == 0
        if name in ("_statistics_kernel", "_gradient_kernel") and divisible:
            assert code.wide_loads > 0, name
        if name in ("_vector_kernel", "_stream_kernel"):
            assert name == "_stream_kernel" or launch.arguments["VECTOR"] < 4 or code.wide_loads
            if launch.arguments["ROWS"] == 1:
                # Scales may be moved between threads once a round, codes and inputs never.
                assert code.barriers <= 2, (name, code.barriers)
                each = code.instructions / weights_of_a_lane(launch) / 32
                assert each <= INSTRUCTIONS_PER_WEIGHT, (name, each)


@pytest.mark.parametrize("site", list(SITES))
def test_kernels_compile_for_an_h100_without_a_spill(site):
    check(SITES[site], FAST)


@pytest.mark.slow
@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize("site", list(SITES))
def test_kernels_compile_for_other_devices_without_a_spill(site, target):
    check(SITES[site], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", list(gpu_aot.TARGETS))
@pytest.mark.parametrize("site", list(MORE))
def test_more_shapes_and_types_compile_without_a_spill(site, target):
    check(MORE[site], target)


def test_every_kernel_of_the_packages_has_a_ceiling():
    """A new kernel joins the table, and so these tests."""
    named = {
        name for module in (rows, packed, rounding) for name in vars(module) if "_kernel" in name
    }
    kernels = {name for name in named if name.endswith("_kernel")}
    assert kernels == set(REGISTERS)
