"""Where the time of a small loss goes: 512 x 100 logits, forward and backward, one CPU thread.

    python benchmarks/profile_small.py [--rounds 60]

Beside `F.cross_entropy` and `rlo` stand the parts: `operations` is what `rlo` computes, called one
after the other without autograd; `function` is an autograd function in Python with the same inputs,
outputs and saved tensors that computes next to nothing; `call` is all that is left out by calling
that function directly: looking at the arguments and finding the way. Processor time, interleaved.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from harness import compare, write_results
from rlo_core._cpu_rows import row_loss
from rlo_core.functional import rooted_loss
from rlo_core.links import Rooted
from torch import Tensor

ROWS, CLASSES, CALLS = 512, 100, 50


class Empty(torch.autograd.Function):
    """The inputs, outputs and saved tensors of the row loss, and one operation each way."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, link: Rooted, ignore_index: int, reduction: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        index = target.unsqueeze(1)
        q = torch.empty_like(logits)
        ce = q[:, :1]
        ctx.save_for_backward(q, ce.detach(), index, None)
        ctx.options = link, len(target), reduction, logits.dtype
        ctx.set_materialize_grads(False)
        return q.new_empty(()), q.new_empty(ce.shape), q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        q, _, _, _ = ctx.saved_tensors
        return q.detach(), None, None, None, None


def operations(logits: Tensor, target: Tensor, link: Rooted) -> Tensor:
    """What the row loss computes forwards and backwards, without autograd."""
    with torch.no_grad():
        index = target.unsqueeze(1)
        q = torch.softmax(logits, 1)
        picked = q.gather(1, index)
        picked.min().item()
        log_p = picked.log_()
        q.scatter_(1, index, torch.expm1(log_p))
        ce = log_p.neg()
        loss = link.value(ce).mean()
        return q * (link.slope(ce) * (torch.ones_like(loss) / len(target)))


def main() -> None:
    """Measure, and write one line for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, requires_grad=True)
    target = torch.randint(0, CLASSES, (ROWS,))
    link = Rooted(8.0, 10.0)
    plain = logits.detach()

    def steps(loss: Any) -> Any:
        def run() -> None:
            for _ in range(CALLS):
                logits.grad = None
                loss().backward()

        return run

    def forwards() -> None:
        for _ in range(CALLS):
            operations(plain, target, link)

    times = compare(
        {
            "cross_entropy": steps(lambda: F.cross_entropy(logits, target)),
            "rlo": steps(lambda: rooted_loss(logits, target, k=8.0, m=10.0)),
            "row_loss": steps(lambda: row_loss(logits, target, link, -100, "mean")),
            "function": steps(lambda: Empty.apply(logits, target, link, -100, "mean")[0]),
            "operations": forwards,
        },
        rounds=rounds,
        warmup=3,
    )
    micro = {
        name: {key: value / CALLS * 1e6 for key, value in one.items()}
        for name, one in times.items()
    }
    base = micro["cross_entropy"]["median"]
    records = [
        {"part": name, "logits": [ROWS, CLASSES], "ratio": one["median"] / base, "us": one}
        for name, one in micro.items()
    ]
    write_results("small_shapes", records)
    for record in records:
        print(f"{record['part']:14} {record['us']['median']:7.1f} us  x{record['ratio']:.2f}")  # type: ignore[index]


if __name__ == "__main__":
    main()
