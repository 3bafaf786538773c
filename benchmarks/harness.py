"""What every benchmark shares: candidates timed in one run, interleaved and shuffled, JSON lines
out.

`python benchmarks/bench_X.py` runs with this folder on sys.path, so `from harness import compare`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlo_core.runs.record import machine, versions

RESULTS = Path(__file__).resolve().parent / "results"


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.process_time,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, dict[str, float]]:
    """Time each candidate once per round, in an order shuffled each round.

    `process_time` counts this process's work only, so that a busy machine moves the ratio less; use
    `time.perf_counter` with `synchronize=torch.cuda.synchronize` on a GPU.

    Returns:
        For each name: median, minimum and quartiles in seconds over the rounds.
    """
    order = list(candidates)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in order}
    for round_ in range(-warmup, rounds):
        shuffle(order)
        for name in order:
            if synchronize is not None:
                synchronize()
            start = clock()
            candidates[name]()
            if synchronize is not None:
                synchronize()
            if round_ >= 0:
                times[name].append(clock() - start)
    return {
        name: {
            "median": statistics.median(t),
            "min": min(t),
            "q1": statistics.quantiles(t, n=4)[0] if len(t) > 1 else t[0],
            "q3": statistics.quantiles(t, n=4)[2] if len(t) > 1 else t[0],
        }
        for name, t in times.items()
    }


def keep_freed_memory() -> None:
    """Start this script again with a malloc that gives no freed memory back to the system.

    Otherwise glibc returns the larger buffers after each call and the system maps them anew, page
    by page: up to 3 ms of a 1.5 ms loss, paid by whichever candidate's order of freeing it hits.
    """
    settings = {
        "MALLOC_TRIM_THRESHOLD_": "4000000000",
        "MALLOC_MMAP_THRESHOLD_": "4000000000",
        "MALLOC_TOP_PAD_": "268435456",
    }
    if not settings.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def peak_memory(code: str) -> int:
    """Return the growth of peak resident memory, in bytes, over the statements after `# measure`.

    `code` runs in a fresh interpreter, so that one candidate's allocations do not hide another's.
    """
    before, _, after = code.partition("# measure\n")
    program = (
        f"import sys as _s; _s.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from harness import peak_resident as _peak\n"
        + before
        + "\n_b = _peak()\n"
        + after
        + "\nprint('PEAK', _peak() - _b)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    return int(output.rsplit("PEAK", 1)[1])


def peak_resident() -> int:
    """Return the peak resident memory of this process, in bytes.

    Linux keeps it by address space, which a new program starts afresh; `ru_maxrss`, the fallback,
    begins with what the parent had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_results(benchmark: str, records: list[dict[str, Any]]) -> Path:
    """Replace `results/BENCHMARK.jsonl`: a line with machine and versions, then the records."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.jsonl"
    header = {
        "benchmark": benchmark,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    path.write_text("".join(json.dumps(line, default=str) + "\n" for line in [header, *records]))
    return path
