"""The stages of `gpu_check.sh`: each prints its measurements as JSON lines into one file.

Peers (Liger, cut-cross-entropy, GPTQModel) are measured where they are installed, interleaved with
ours. `--quick --device cpu` runs every stage at toy sizes, to check this file without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HEADS = {"gemma-2-2b": (2304, 256_000), "llama-3-8b": (4096, 128_256)}
TOKENS = 8192
PEERS = ("triton", "transformers", "timm", "liger_kernel", "cut_cross_entropy", "gptqmodel")


class Lines:
    """Appends records to the file, one line each, at once."""

    def __init__(self, file: Path, stage: str) -> None:
        self.file, self.stage = file, stage

    def add(self, **record: Any) -> None:
        line = json.dumps({"stage": self.stage, **record})
        with self.file.open("a") as handle:
            handle.write(line + "\n")
        print(line, flush=True)


class Machine:
    """Where to measure, and how long a call takes there."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = torch.device(device), quick
        self.cuda = self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def times(
        self, calls: dict[str, Callable[[], Any]], *, rounds: int = 10
    ) -> dict[str, dict[str, float]]:
        """Milliseconds of each call, interleaved: median, quartiles; peak bytes beside inputs."""
        rounds = 2 if self.quick else rounds
        found: dict[str, list[float]] = {name: [] for name in calls}
        peaks: dict[str, int] = {}
        for turn in range(rounds + 2):
            for name, call in calls.items():
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats(self.device)
                    before = torch.cuda.memory_allocated(self.device)
                self.wait()
                begin = time.perf_counter()
                kept = call()
                self.wait()
                if turn >= 2:
                    found[name].append(1e3 * (time.perf_counter() - begin))
                del kept
                if self.cuda:
                    peaks[name] = torch.cuda.max_memory_allocated(self.device) - before
        results = {}
        for name, values in found.items():
            low, middle, high = statistics.quantiles(values, n=4)
            results[name] = {"ms": middle, "ms_low": low, "ms_high": high}
            results[name]["peak_gb"] = peaks.get(name, 0) / 1e9
        return results


def machine(lines: Lines, m: Machine) -> None:
    """Versions, and the two ceilings: a copy and a large product."""
    versions = {}
    for name in (
        "triton",
        "transformers",
        "timm",
        "liger_kernel",
        "cut_cross_entropy",
        "gptqmodel",
    ):
        if importlib.util.find_spec(name):
            module = importlib.import_module(name)
            versions[name] = str(getattr(module, "__version__", "there"))
    card = torch.cuda.get_device_name(m.device) if m.cuda else platform.processor() or "cpu"
    lines.add(card=card, torch=torch.__version__, python=platform.python_version(), **versions)
    side = 256 if m.quick else 8192
    a = torch.randn(side, side, device=m.device, dtype=torch.bfloat16)
    x = torch.empty((1 << 20) if m.quick else (1 << 30), device=m.device, dtype=torch.uint8)
    y = torch.empty_like(x)
    found = m.times({"product": lambda: a @ a, "copy": lambda: y.copy_(x)})
    product, copy = found["product"]["ms"], found["copy"]["ms"]
    lines.add(
        tflops_bf16=2 * side**3 / product / 1e9, gb_per_second=2 * x.numel() / copy / 1e6, **found
    )


def _linear_calls(
    hidden: Any, weight: Any, target: Any, m: Machine
) -> dict[str, Callable[[], Any]]:
    from rlo_core import CE, Rooted, link_linear_cross_entropy

    def ours(link: Any, impl: str) -> Callable[[], Any]:
        def call() -> Any:
            loss = link_linear_cross_entropy(hidden, weight, target, link, impl=impl)
            return torch.autograd.grad(loss, (hidden, weight))

        return call

    calls = {
        "two-pass ce": ours(CE(), "two-pass"),
        "two-pass rlo": ours(Rooted(5.0), "two-pass"),
        "chunked ce": ours(CE(), "chunked"),
    }
    if m.cuda and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        def cce(eps: Any) -> Callable[[], Any]:
            def call() -> Any:
                loss = linear_cross_entropy(hidden, weight, target, filter_eps=eps)
                return torch.autograd.grad(loss, (hidden, weight))

            return call

        calls["cce"], calls["cce unfiltered"] = cce("auto"), cce(None)
        calls["rlo by cce"] = ours(Rooted(5.0), "cce")
    if m.cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        calls["liger"] = lambda: torch.autograd.grad(
            liger(weight, hidden, target), (hidden, weight)
        )
    return calls


def linear(lines: Lines, m: Machine) -> None:
    """Fused linear losses at both heads: random logits, and peaked ones as after training."""
    for head, (width, classes) in HEADS.items():
        tokens = 64 if m.quick else TOKENS
        width, classes = (32, 1000) if m.quick else (width, classes)
        for kind in ("random", "peaked"):
            hidden = torch.randn(tokens, width, device=m.device, dtype=torch.bfloat16)
            weight = torch.randn(classes, width, device=m.device, dtype=torch.bfloat16) * 0.02
            target = torch.randint(classes, (tokens,), device=m.device)
            if kind == "peaked":  # most of a trained model's tokens are nearly sure
                hidden = hidden * 0.3 + 12.0 * torch.nn.functional.normalize(
                    weight[target].float(), dim=-1
                ).to(hidden.dtype) * torch.rand(tokens, 1, device=m.device).to(hidden.dtype)
            hidden.requires_grad_(), weight.requires_grad_()
            for name, record in m.times(_linear_calls(hidden, weight, target, m), rounds=5).items():
                lines.add(head=head, kind=kind, tokens=tokens, name=name, **record)
            del hidden, weight


def losses(lines: Lines, m: Machine) -> None:
    """Losses of logits beside torch's cross entropy."""
    from rlo_core import create_loss

    rows, classes = (64, 100) if m.quick else (4096, 32_000)
    logits = torch.randn(rows, classes, device=m.device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(classes, (rows,), device=m.device)
    calls = {
        "torch": lambda: torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits, target), logits
        )
    }
    for spec in ("ce", "rlo:k=5", "rlo-convex:k=3", "focal"):
        criterion = create_loss(spec)
        calls[spec] = lambda criterion=criterion: torch.autograd.grad(
            criterion(logits, target), logits
        )
    for name, record in m.times(calls).items():
        lines.add(name=name, rows=rows, classes=classes, **record)


def quantize(lines: Lines, m: Machine) -> None:
    """`quantize_layer`: seconds, and its waits for the device."""
    from rlo_gptq.rounding.layer import quantize_layer
    from rlo_gptq.settings import LayerSettings

    shapes = [(64, 128)] if m.quick else [(4096, 4096), (4096, 11008)]
    for out, width in shapes:
        x = torch.randn(2 * width, width, device=m.device)
        hessian = x.T @ x / len(x) + 0.01 * torch.eye(width, device=m.device)
        weight = torch.randn(out, width, device=m.device)
        for name, settings in {
            "gptq 4 bits g128": LayerSettings(bits=4, method="gptq", group_size=128),
            "ldlqRG 2 bits": LayerSettings(bits=2, incoherence="hadamard", rescale=True),
        }.items():
            seconds = []
            for _ in range(2):
                m.wait()
                begin = time.perf_counter()
                layer = quantize_layer(weight, hessian, settings, seed=0)
                m.wait()
                seconds.append(time.perf_counter() - begin)
            lines.add(
                name=name,
                shape=[out, width],
                first_s=seconds[0],
                s=seconds[1],
                proxy=float(layer.proxy),
            )


def packed(lines: Lines, m: Machine) -> None:
    """Packed products at 1, 4 and 16 rows beside fp16, in CUDA graphs over rotating weights."""
    from rlo_gptq.packed.packing import packed_words
    from rlo_gptq.packed.product import Stored, packed_product

    side = 256 if m.quick else 4096
    copies = 2 if m.quick else 16  # together more than the second cache holds
    dense = [torch.randn(side, side, device=m.device, dtype=torch.float16) for _ in range(copies)]
    for rows in (1, 4, 16):
        x = torch.randn(rows, side, device=m.device, dtype=torch.float16)
        calls: dict[str, Callable[[], Any]] = {"fp16": lambda x=x: [x @ w.T for w in dense]}
        for bits in (2, 3, 4, 8):
            weights = [
                Stored(
                    torch.randint(
                        -(2**31),
                        2**31 - 1,
                        (side, packed_words(side, bits)),
                        dtype=torch.int32,
                        device=m.device,
                    ),
                    torch.rand(side, side // 128, device=m.device).half(),
                    None,
                    bits,
                    128,
                    side,
                    (1 << bits) / 2 - 0.5,
                    False,
                )
                for _ in range(copies)
            ]
            calls[f"{bits} bits"] = lambda x=x, weights=weights: [
                packed_product(x, w, input_scale=None, order=None, bias=None) for w in weights
            ]
        if m.cuda:
            calls = {name: captured(call) for name, call in calls.items()}
        for name, record in m.times(calls, rounds=30).items():
            lines.add(name=name, rows=rows, us=1e3 * record["ms"] / copies)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay


def trellis(lines: Lines, m: Machine) -> None:
    """One column, and a small layer, by the trellis."""
    from rlo_gptq.rounding.layer import quantize_layer
    from rlo_gptq.settings import LayerSettings

    out, width = (64, 32) if m.quick else (4096, 256)
    settings = LayerSettings(grid="trellis", method="gptq", incoherence="hadamard")
    weight = torch.randn(out, width, device=m.device)
    m.wait()
    begin = time.perf_counter()
    layer = quantize_layer(weight, torch.eye(width, device=m.device), settings, seed=0)
    m.wait()
    lines.add(shape=[out, width], s=time.perf_counter() - begin, proxy=float(layer.proxy))


def hosts(lines: Lines, m: Machine) -> None:
    """A training step of a language model, an image model and a GAN pair."""
    from rlo_core import create_loss
    from rlo_stylegan.criterion import GanLoss

    kind = m.device.type
    for spec in ("ce", "rlo:k=8"):
        criterion = create_loss(spec)
        if importlib.util.find_spec("timm"):
            import timm

            model = timm.create_model("resnet18", num_classes=100).to(m.device)
            size, batch = (32, 2) if m.quick else (224, 64)
            x = torch.randn(batch, 3, size, size, device=m.device)
            y = torch.randint(100, (batch,), device=m.device)

            def step(
                model: Any = model, criterion: Any = criterion, x: Any = x, y: Any = y
            ) -> None:
                with torch.autocast(kind, dtype=torch.bfloat16):
                    criterion(model(x), y).backward()

            for record in m.times({spec: step}).values():
                lines.add(host="timm", name=spec, **record)
        if importlib.util.find_spec("transformers"):
            import transformers
            from rlo_core import LinkLinearCrossEntropy

            width, layers, length = (32, 1, 16) if m.quick else (1024, 4, 1024)
            config = transformers.LlamaConfig(
                vocab_size=1000 if m.quick else 128_256,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
            )
            body = transformers.LlamaForCausalLM(config).to(m.device, torch.bfloat16)
            ids = torch.randint(config.vocab_size, (2, length), device=m.device)
            fused = LinkLinearCrossEntropy(criterion, shift=True)

            def learn(body: Any = body, fused: Any = fused, ids: Any = ids) -> None:
                hidden = body.model(ids).last_hidden_state
                fused(hidden, body.lm_head.weight, ids).backward()

            for record in m.times({spec: learn}).values():
                lines.add(host="transformers", name=spec, **record)
    gan = GanLoss("rlo-convex:k=2")
    logits = torch.randn(64, device=m.device, requires_grad=True)
    for record in m.times({"gan": lambda: gan(logits, "G").sum().backward()}).values():
        lines.add(host="stylegan", name="rlo-convex:k=2", **record)


def table(file: Path) -> None:
    """A short table of everything that was measured."""
    for line in file.read_text().splitlines():
        record = json.loads(line)
        what = [
            str(record[k])
            for k in ("stage", "head", "kind", "host", "shape", "rows", "name")
            if k in record
        ]
        values = [
            f"{k} {record[k]:.4g}"
            for k in ("ms", "us", "s", "peak_gb", "tflops_bf16", "gb_per_second", "exit", "seconds")
            if isinstance(record.get(k), (int, float))
        ]
        print(f"{' '.join(what):50} {', '.join(values)}")


STAGES = {f.__name__: f for f in (machine, linear, losses, quantize, packed, trellis, hosts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "table"])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.jsonl"))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.stage == "table":
        table(given.out)
        return
    device = torch.device(given.device)
    if device.type == "cpu" and not given.quick:
        parser.error("no CUDA device; --quick --device cpu tries the stages at toy sizes")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    STAGES[given.stage](Lines(given.out, given.stage), Machine(given.device, given.quick))


if __name__ == "__main__":
    main()
