"""Fused linear losses against their peers: time and peak memory of one loss with its gradients.

Every candidate runs once a round, in an order that is shuffled each round. On a CPU the clock is
process time on one thread, and memory is the growth of the peak resident set in a fresh process.

    python benchmarks/bench_linear.py                   # all cases of this machine
    python benchmarks/bench_linear.py --case 32k-fp32   # one
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from harness import RESULTS, compare, peak_memory, write_results
from rlo_core import CE, Link, Rooted, link_cross_entropy, link_linear_cross_entropy
from torch import Tensor

LINK = Rooted(5.0)
"""The authors' k for language models."""
BASELINE = "linear + cross_entropy"
FLOOR = "three matmuls"


@dataclass(frozen=True)
class Case:
    """One setting; all candidates of it get the same tensors."""

    name: str
    vocabulary: int
    dtype: str
    ignored: float = 0.0
    tokens: int = 2048
    width: int = 512
    device: str = "cpu"
    rounds: int = 4
    slow_peers: bool = True


CPU_CASES = (
    # 2048 tokens: four chunks of 512. 512 features: a small model, where the loss weighs most.
    Case("32k-fp32", 32000, "float32"),
    Case("32k-bf16", 32000, "bfloat16"),
    Case("32k-fp32-half", 32000, "float32", ignored=0.5, slow_peers=False),
    Case("32k-bf16-half", 32000, "bfloat16", ignored=0.5, slow_peers=False),
    # Llama 3's vocabulary: the tile no longer fits any cache.
    Case("128k-fp32", 128256, "float32", rounds=2, slow_peers=False),
    Case("128k-bf16", 128256, "bfloat16", rounds=2, slow_peers=False),
)
CUDA_CASES = (
    # The heads of Gemma 2 2B and Llama 3 8B: published figures of other kernels are for these.
    Case("gemma2-2b", 256000, "bfloat16", tokens=8192, width=2304, device="cuda", rounds=20),
    Case("llama3-8b", 128256, "bfloat16", tokens=8192, width=4096, device="cuda", rounds=20),
)
CASES = {case.name: case for case in (*CPU_CASES, *CUDA_CASES)}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def released(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Softmax, pick, root: what published scripts do; -100 has to be taken out by hand."""
    kept = target != -100
    p = F.linear(hidden, weight).softmax(-1)[kept]
    return (5.0 - 5.0 * p.gather(1, target[kept].unsqueeze(1)) ** (1 / 5.0)).mean()


def fused(link: Link, reduction: Any = "mean") -> Loss:
    """Ours, chunked."""
    return lambda h, w, y: link_linear_cross_entropy(
        h, w, y, link, reduction=reduction, impl="chunked"
    ).mean()


def of_torch(chunk: int | None, link: Link | None = None) -> Loss:
    """torch's own fused loss: its default chunks or chunks of a given size, or a link on top."""
    options = (
        torch.nn.LinearCrossEntropyOptions()
        if chunk is None
        else torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    )

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        if link is None:
            return F.linear_cross_entropy(hidden, weight, target, options=options)
        ce = F.linear_cross_entropy(hidden, weight, target, options=options, reduction="none")
        return link.value(ce.float()).sum() / (target != -100).sum()

    return loss


def of_trl(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """TRL's chunked log-probabilities with the link on top; it keeps ignored rows."""
    from trl.kernels import ChunkedLogProbFunction

    kept = target != -100
    log_p = ChunkedLogProbFunction.apply(
        hidden, weight, None, target.clamp(min=0), 1.0, 8192, None, 1.0, ()
    )[0]
    return torch.where(kept, LINK.value(-log_p), 0.0).sum() / kept.sum()


def of_liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Liger's fused linear cross entropy (ce only: it has no per-token transform)."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, target)


def of_cce(link: Link | None = None) -> Loss:
    """cut-cross-entropy, alone or as our implementation "cce"."""

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        if link is not None:
            return link_linear_cross_entropy(hidden, weight, target, link, impl="cce")
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, target)

    return loss


def losses(case: Case) -> dict[str, Loss]:
    """The candidates of a case, by name."""
    found: dict[str, Loss] = {
        # In half precision the logits go up to float32 first, as causal language models do it.
        BASELINE: lambda h, w, y: F.cross_entropy(F.linear(h, w).float(), y),
        "softmax-pow as released": released,
        "torch linear_cross_entropy, 512 rows": of_torch(512),
        "rlo_core ce": fused(CE()),
        "rlo_core rlo": fused(LINK),
    }
    if case.dtype == "bfloat16":
        found["linear + cross_entropy, all in half"] = lambda h, w, y: F.cross_entropy(
            F.linear(h, w), y
        )
    if case.slow_peers:
        found |= {
            "linear + rlo": lambda h, w, y: link_cross_entropy(F.linear(h, w), y, LINK),
            "torch linear_cross_entropy, default": of_torch(None),
            "torch linear_cross_entropy none + rlo, 512 rows": of_torch(512, LINK),
            "rlo_core rlo, reduction none": fused(LINK, "none"),
        }
        if importlib.util.find_spec("trl") is not None:
            found["TRL chunked log-prob + rlo"] = of_trl
    if case.device == "cuda":
        if importlib.util.find_spec("liger_kernel") is not None:
            found["Liger ce"] = of_liger
        if importlib.util.find_spec("cut_cross_entropy") is not None:
            found |= {"cut-cross-entropy ce": of_cce(), "rlo_core rlo, impl cce": of_cce(LINK)}
    return found


def candidate(name: str, case: Case) -> Callable[[], object]:
    """Return a call that computes the loss and the gradients of hidden and weight."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.tokens, case.width, device=case.device).to(dtype).requires_grad_()
    weight = torch.randn(case.vocabulary, case.width, device=case.device).mul_(0.05).to(dtype)
    weight.requires_grad_()
    target = torch.randint(case.vocabulary, (case.tokens,), device=case.device)
    target[torch.rand(case.tokens, device=case.device) < case.ignored] = -100
    if name == FLOOR:
        with torch.no_grad():
            rows = hidden[target != -100].clone()
        return lambda: matmuls(rows, weight.detach())
    loss = losses(case)[name]
    return lambda: torch.autograd.grad(loss(hidden, weight, target), (hidden, weight))


def matmuls(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The three products that any exact loss with gradients needs, at once over all kept rows."""
    logits = hidden @ weight.t()
    return logits @ weight, logits.t() @ hidden


def peak(name: str, case: Case) -> int:
    """Return the bytes that one call adds to the peak, inputs not counted."""
    if case.device == "cuda":
        run = candidate(name, case)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "from bench_linear import CASES, candidate\n"
        f"run = candidate({name!r}, CASES[{case.name!r}])\n"
        # Library buffers and thread pools are not the loss's: one small product brings them in.
        "x = torch.randn(64, 64, dtype=getattr(torch, CASES["
        + repr(case.name)
        + "].dtype)); x @ x\n"
        "# measure\nrun()\n"
    )
    return peak_memory(code)


def bench(case: Case, *, memory: bool = True, only: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return one record per candidate, with its ratios to the baseline."""
    names = [name for name in losses(case) if not only or name in (BASELINE, *only)] + [FLOOR]
    # First: a child process starts with the peak of its parent, which is small only now.
    peaks = {name: peak(name, case) for name in names} if memory else {}
    clock = time.process_time if case.device == "cpu" else time.perf_counter
    times = compare(
        {name: candidate(name, case) for name in names},
        rounds=case.rounds,
        warmup=1,
        clock=clock,
        synchronize=torch.cuda.synchronize if case.device == "cuda" else None,
    )
    records = []
    for name in names:
        record = {"candidate": name, **asdict(case), **times[name]}
        for other in (BASELINE, FLOOR):
            record[f"time / {other}"] = times[name]["median"] / times[other]["median"]
        if memory:
            record["peak_bytes"] = peaks[name]
            record[f"peak / {BASELINE}"] = peaks[name] / peaks[BASELINE]
        records.append(record)
        mb = f"{peaks[name] / 1e6:8.0f} MB" if memory else ""
        click.echo(
            f"{case.name:15} {name:50} {times[name]['median'] * 1e3:9.1f} ms "
            f"{record[f'time / {BASELINE}']:.3f} of ce, "
            f"{record[f'time / {FLOOR}']:.3f} of floor {mb}"
        )
    if {"rlo_core rlo", "rlo_core ce"} <= set(names):
        ratio = times["rlo_core rlo"]["median"] / times["rlo_core ce"]["median"]
        click.echo(f"{case.name:15} rlo / ce in the same kernel: {ratio:.3f}")
    return records


def other_records(benchmark: str, case: Case) -> list[dict[str, Any]]:
    """Return what the results file has of the other cases."""
    path = RESULTS / f"{benchmark}.jsonl"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return [record for record in map(json.loads, lines) if record["name"] != case.name]


@click.command()
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Repeatable.")
@click.option("--only", multiple=True, help="A candidate beside baseline and floor; repeatable.")
@click.option("--rounds", type=int, help="Instead of the case's own.")
@click.option("--memory/--no-memory", default=True, help="Measure peak memory too.")
@click.option("--name", default="linear", show_default=True, help="Of the results file.")
@click.option("--write/--no-write", default=True, help="Keep the records in benchmarks/results.")
def main(
    names: tuple[str, ...],
    only: tuple[str, ...],
    rounds: int | None,
    memory: bool,
    name: str,
    write: bool,
) -> None:
    """Time fused linear losses and their peers."""
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    chosen = [CASES[name] for name in names] or [*CPU_CASES, *(CUDA_CASES if cuda else ())]
    for case in chosen:
        if rounds is not None:
            case = Case(**{**asdict(case), "rounds": rounds})
        records = bench(case, memory=memory, only=only)
        if write:  # after every case: a long run that is cut short keeps its start
            write_results(name, [*other_records(name, case), *records])


if __name__ == "__main__":
    main()
