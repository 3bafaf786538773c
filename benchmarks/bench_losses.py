"""Forward and backward of the losses beside torch's cross entropy, eager and compiled.

    python benchmarks/bench_losses.py             # CPU, one thread; CUDA too where there is one
    python benchmarks/bench_losses.py --no-compile

Candidates are interleaved in one process, CPU times are process time, and freed memory stays with
the process. Two shapes where a call's fixed cost shows (CIFAR's 10 and 100 classes), ImageNet's
1000, and a language model's vocabulary.
Peak memory is what torch's allocator handed out on top of the inputs. `released` is the formula of
the released code: softmax, then power.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import compare, keep_freed_memory, write_results
from rlo_core import focal_loss, rooted_convex_loss, rooted_loss
from torch import Tensor

SHAPES = ((512, 10), (512, 100), (1024, 1000), (2048, 50272))
LossFunction = Callable[[Tensor, Tensor], Tensor]


def released(logits: Tensor, target: Tensor, k: float = 3.0, m: float = 3.0) -> Tensor:
    p = F.softmax(logits, dim=1).gather(1, target.unsqueeze(1)).squeeze(1)
    return (m * (1.0 - torch.pow(p, 1.0 / k))).mean()


LOSSES: dict[str, LossFunction] = {
    "cross_entropy": F.cross_entropy,
    "rlo": rooted_loss,
    "rlo-convex": rooted_convex_loss,
    "focal": focal_loss,
    "released": released,
}
COMPILED = ("cross_entropy", "rlo", "rlo-convex")


def forward_backward(loss: LossFunction, logits: Tensor, target: Tensor) -> Callable[[], None]:
    # As many calls as make a time that the clock resolves.
    calls = max(1, 400_000 // logits.numel())

    def run() -> None:
        for _ in range(calls):
            logits.grad = None
            loss(logits, target).backward()

    return run


def peak_bytes(run: Callable[[], None], logits: Tensor) -> int:
    """The most that was allocated at a time on top of the inputs."""
    logits.grad = None
    if logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    logits.grad = None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(
    losses: dict[str, LossFunction],
    mode: str,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
) -> list[dict[str, Any]]:
    rows, classes = shape
    torch.manual_seed(0)
    logits = torch.randn(rows, classes, device=device, dtype=dtype, requires_grad=True)
    target = torch.randint(0, classes, (rows,), device=device)
    runs = {name: forward_backward(loss, logits, target) for name, loss in losses.items()}
    cuda = device == "cuda"
    times = compare(
        runs,
        rounds=5 if rows * classes > 10**7 and not cuda else 30,
        clock=time.perf_counter if cuda else time.process_time,
        synchronize=torch.cuda.synchronize if cuda else None,
    )
    calls = max(1, 400_000 // logits.numel())
    peaks = {name: peak_bytes(run, logits) for name, run in runs.items()}
    records = []
    for name, quartiles in times.items():
        records.append(
            {
                "loss": name,
                "mode": mode,
                "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "rows": rows,
                "classes": classes,
                "microseconds": {key: value / calls * 1e6 for key, value in quartiles.items()},
                "time / cross_entropy": quartiles["median"] / times["cross_entropy"]["median"],
                "q1 / cross_entropy": quartiles["q1"] / times["cross_entropy"]["q1"],
                "peak bytes": peaks[name],
                "memory / cross_entropy": peaks[name] / max(peaks["cross_entropy"], 1),
            }
        )
        last = records[-1]
        print(
            f"{device} {last['dtype']:8} {mode:8} {rows}x{classes:<6} {name:14} "
            f"{last['microseconds']['median']:10.0f} us  {last['time / cross_entropy']:.2f}x "
            f"(q1 {last['q1 / cross_entropy']:.2f}x)  {last['memory / cross_entropy']:.3f}x memory",
            flush=True,
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    records = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                records += measure(LOSSES, "eager", device, dtype, shape)
    write_results("losses", records)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES if not arguments.no_compile else ():
                torch.compiler.reset()
                compiled: dict[str, LossFunction] = {
                    name: torch.compile(LOSSES[name], fullgraph=True) for name in COMPILED
                }
                records += measure(compiled, "compiled", device, dtype, shape)
                write_results("losses", records)


if __name__ == "__main__":
    main()
