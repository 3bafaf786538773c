"""Run a checkout's training on a CPU with tiny networks: for the upstream tests only.

`python cpu_run.py CHECKOUT OVERRIDES.json script ARGS...` runs `CHECKOUT/train.py ARGS...` as a
script; with `launcher` for `script` it runs `rlo-stylegan train CHECKOUT/train.py ARGS...`. The
training loop asks for a CUDA device, pinned memory and CUDA events; here it gets a CPU device and
events that measure nothing, through the name `torch` of its own module. OVERRIDES replaces options
of the training loop (a nested object updates one), so that networks and durations are small.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # a checkout of 2021 on today's torch has many

import torch  # noqa: E402

torch.set_num_threads(1)


class _Event:
    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: object) -> float:
        return 0.0


class _Cuda:
    Event = _Event

    def current_stream(self, device: object) -> None: ...

    def max_memory_allocated(self, device: object) -> int:
        return 0

    def max_memory_reserved(self, device: object) -> int:
        return 0

    def reset_peak_memory_stats(self) -> None: ...


class _Torch:
    """The module `torch` with a CPU where a CUDA device is asked for."""

    cuda = _Cuda()

    def empty(self, *args: Any, **options: Any) -> torch.Tensor:
        # The loop summarises networks on uninitialised memory, which moves their running means.
        return torch.zeros(*args, **options)

    def device(self, *args: Any) -> torch.device:
        return torch.device("cpu") if args[0] == "cuda" else torch.device(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _update(options: dict[str, Any], overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(options.get(key), dict):
            _update(options[key], value)
        else:
            options[key] = value


def main() -> None:
    checkout, overrides_file, how, *args = sys.argv[1:]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, checkout)
    loop = importlib.import_module("training.training_loop")
    loop.torch = _Torch()  # type: ignore[attr-defined]
    torch.Tensor.pin_memory = lambda self, *a: self  # type: ignore[method-assign]
    overrides = json.loads(Path(overrides_file).read_text())
    original = loop.training_loop

    def training_loop(**options: Any) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        _update(options, overrides)
        original(**options)

    grid = loop.setup_snapshot_image_grid

    def small_grid(*args: Any, **options: Any) -> Any:
        _, images, *labels = grid(*args, **options)
        return (2, 2), images[:4], *(part[:4] for part in labels)

    loop.setup_snapshot_image_grid = small_grid
    loop.training_loop = training_loop
    script = str(Path(checkout) / "train.py")
    if how == "script":
        sys.argv = [script, *args]
        runpy.run_path(script, run_name="__main__")
    else:
        from rlo_stylegan.cli import main as command

        command(["train", script, *args], prog_name="rlo-stylegan")


if __name__ == "__main__":
    main()
