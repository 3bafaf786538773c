"""Triton kernels compiled for real GPUs without one, as their launch sites launch them.

`recorded` replaces the kernels of a module by recorders: code that launches them on meta tensors
leaves the arguments, from which `build` makes the signature that a launch on a device would have
(types, divisibility by 16, values of 1, constants). `measured` reads what the compiler made of it.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


@dataclass
class Launch:
    """One launch of a kernel: the function, its arguments by name, and its launch options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class _Recorder:
    def __init__(self, kernel: Any, into: list[Launch]) -> None:
        self.kernel, self.into = kernel, into

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {k: kwargs.pop(k) for k in LAUNCH_OPTIONS if k in kwargs}
            arguments = {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}
            self.into.append(Launch(self.kernel, grid, arguments, options))

        return launch


@contextlib.contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Record the launches of the modules' Triton kernels (names that end in `_kernel`)."""
    launches: list[Launch] = []
    replaced: list[tuple[ModuleType, str, Any]] = []
    try:
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                replaced.append((module, name, getattr(module, name)))
                setattr(module, name, _Recorder(getattr(module, name), launches))
        yield launches
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)


def build(launch: Launch, target: str) -> Any:
    """Compile a launch for one of `TARGETS`; returns Triton's compiled kernel."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for parameter in launch.kernel.params:
        i, name, value = parameter.num, parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    return triton.compile(source, target=TARGETS[target], options=launch.options)


@dataclass
class Measured:
    """What the compiler made of a kernel; counts are of instructions in its text, not of runs.

    `spilled` is the bytes of local memory: stack frames and spilled registers.
    """

    registers: int
    spilled: int
    shared: int
    instructions: int
    loads: int
    wide_loads: int
    float64: int
    tensor_cores: int
    shuffles: int
    barriers: int
    text: str


def measured(binary: Any, target: str) -> Measured:
    """Read registers, local memory and instructions out of a compiled kernel."""
    if TARGETS[target].backend != "cuda":
        return _measured_on_amd(binary)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _dumped("-res-usage", file.name)
        text = _dumped("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found, usage

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    return Measured(
        registers=int(found[1]),
        spilled=int(found[2]) + int(found[3]) + count(r"\bLDL\b|\bSTL\b"),
        shared=binary.metadata.shared,
        instructions=count(r"/\*[0-9a-f]{4,5}\*/\s+(?!NOP|BRA)"),
        loads=count(r"\bLDG"),
        wide_loads=count(r"\bLDG\.E(?:\.\w+)*\.128"),
        float64=count(r"\bD(?:ADD|MUL|FMA|SETP)\b"),
        tensor_cores=count(r"HMMA|HGMMA|IMMA|UTCHMMA"),
        shuffles=count(r"\bSHFL"),
        barriers=count(r"BAR\.SYNC"),
        text=text,
    )


def _dumped(what: str, file: str) -> str:
    done = subprocess.run([CUOBJDUMP, what, file], capture_output=True, text=True, check=True)
    return done.stdout


def _measured_on_amd(binary: Any) -> Measured:
    text: str = binary.asm["amdgcn"]

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        assert found, key
        return int(found[1])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    return Measured(
        registers=value("vgpr_count"),
        spilled=value("vgpr_spill_count") + value("private_segment_fixed_size"),
        shared=binary.metadata.shared,
        instructions=count(r"\n\t[sv]_|\n\t(?:global|buffer|ds)_"),
        loads=count(r"(?:global|buffer)_load"),
        wide_loads=count(r"(?:global|buffer)_load_dwordx4"),
        float64=count(r"v_(?:add|mul|fma|cmp_\w+)_f64"),
        tensor_cores=count(r"v_mfma"),
        shuffles=count(r"ds_bpermute|_dpp\b|ds_swizzle|v_readlane"),
        barriers=count(r"s_barrier"),
        text=text,
    )
