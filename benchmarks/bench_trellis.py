"""Trellis codes of a Gaussian: squared error, time to encode and to decode, kinds of codebooks.

`python benchmarks/bench_trellis.py` encodes normal numbers as columns of 1024 rows. The squared
error is relative to the numbers' own mean square; the limit is 4^-bits. `sum of bytes` and `sum of
halves` are the computed codes of QTIP (1MAD and 3INST, from the paper's description) in place of
the permuted quantiles.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from harness import write_results
from rlo_gptq.rounding.trellis import Trellis, decode, decode_rows
from rlo_gptq.rounding.viterbi import encode
from torch import Tensor

ROWS, SEEDS = 1024, 4


@dataclass(frozen=True)
class _Hashed(Trellis):
    """A trellis with another codebook."""

    rule: str = "sum of bytes"

    def values(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        state = torch.arange(self.states)
        if self.rule == "sum of bytes":
            word = (state * 34038481 + 76625530) & 0xFFFFFFFF
            total = sum((word >> shift) & 255 for shift in (0, 8, 16, 24))
            assert isinstance(total, Tensor)
            value = total.double() - total.double().mean()
        else:
            word = (state * 89226354 + 64248484) & 0xFFFFFFFF
            word = (word & 0x8FFF8FFF) ^ 0x3B603B60
            halves = torch.stack([word & 0xFFFF, word >> 16])
            value = halves.to(torch.uint16).view(torch.float16).double().sum(0)
        return (value / value.square().mean().sqrt()).to(device, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--columns", type=int, default=8, help="of each seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds: list[tuple[str, Trellis]] = [
        ("permuted quantiles", Trellis(bits, L)) for bits in (1, 2, 3, 4) for L in (10, 12, 14, 16)
    ]
    kinds += [
        (rule, _Hashed(2, L, rule)) for rule in ("sum of bytes", "sum of halves") for L in (12, 16)
    ]
    records = []
    for name, trellis in kinds:
        encode(torch.randn(ROWS), torch.ones(ROWS), trellis)  # compiled, tables made
        errors, encoding = [], 0.0
        for seed in range(SEEDS):
            x = torch.randn(args.columns, ROWS, generator=torch.Generator().manual_seed(seed))
            start = time.process_time()
            codes = torch.stack([encode(row, torch.ones(ROWS), trellis) for row in x])
            encoding += time.process_time() - start
            errors.append(float((x - decode(codes, trellis)).square().mean() / x.square().mean()))
        packed = torch.randint(1 << trellis.bits, (ROWS, 512), dtype=torch.uint8)
        times = []
        for _ in range(7):
            start = time.process_time()
            decode_rows(lambda a, b, packed=packed: packed[a:b], trellis, ROWS, 0, ROWS)
            times.append(time.process_time() - start)
        records.append(
            {
                "codebook": name,
                "bits": trellis.bits,
                "state_bits": trellis.state_bits,
                "squared_error": round(sum(errors) / SEEDS, 6),
                "squared_error_of_seeds": [round(error, 6) for error in errors],
                "limit": 4.0**-trellis.bits,
                "encode_us_a_weight": round(1e6 * encoding / (SEEDS * args.columns * ROWS), 3),
                "decode_ns_a_weight": round(1e9 * sorted(times)[3] / packed.numel(), 2),
            }
        )
        print(records[-1], flush=True)
        write_results("trellis", records)


if __name__ == "__main__":
    main()
