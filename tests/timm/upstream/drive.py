"""Run timm's real train.py several times in one process, and check the loss that each step saw.

`python drive.py CHECKOUT DATA OUTPUT` prints one JSON line a run. A process of its own, so that the
timm in it is the checkout's; one for many runs, so that it is imported once.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml
from rlo_core.launch import run_script
from rlo_timm.launcher import slot
from rlo_timm.launcher.train_script import transform
from torch import Tensor

K, M = 8.0, 10.0
SPEC = f"rlo:k={K:g},m={M:g}"
COMMON = ["--model", "resnet18", "--num-classes", "10", "--input-size", "3", "32", "32", "-b", "8"]
COMMON += ["--epochs", "1", "--warmup-epochs", "0", "--lr", "0.01", "--device", "cpu"]
COMMON += ["--workers", "1", "--seed", "3"]


seen: list[tuple[Tensor, Tensor, Tensor]] = []
_counterpart = slot.counterpart


def _see(module: torch.nn.Module, inputs: tuple[Tensor, Tensor], value: Tensor) -> None:
    # A copy: the Jensen-Shannon loss adds its divergence in place.
    seen.append((inputs[0].detach(), inputs[1], value.detach().clone()))


def _spied(criterion: Any, spec: Any) -> Any:
    ours = _counterpart(criterion, spec)
    inner = getattr(ours, "cross_entropy_loss", ours)
    inner.register_forward_hook(_see)
    return ours


slot.counterpart = _spied


def _teach_without_weights() -> None:
    """Let distillation make its teacher untrained: there is no network here."""
    try:
        from timm.task import distillation
    except ImportError:
        return
    create = distillation.create_model

    def untrained(*args: Any, **kwargs: Any) -> Any:
        return create(*args, **{**kwargs, "pretrained": False})

    distillation.create_model = untrained


def by_hand(output: Tensor, target: Tensor, flags: dict[str, Any]) -> Tensor:
    """Core's loss from the definition, in float64."""
    z = output.double()
    mixed = "mixup" in flags
    smoothing = 0.0 if mixed else float(flags.get("smoothing", 0.1))
    q = target.double()
    if not mixed:
        q = torch.nn.functional.one_hot(target, 10) * (1 - smoothing) + smoothing / 10
    if not flags.get("bce"):
        return (q * M * (1 - torch.softmax(z, -1) ** (1 / K))).sum(-1).mean()
    if "threshold" in flags:
        q = (q > flags["threshold"]).double()
    p = torch.sigmoid(z)
    terms = q * flags.get("pos_weight", 1.0) * M * (1 - p ** (1 / K)) + (1 - q) * M * (
        1 - (1 - p) ** (1 / K)
    )
    return terms.sum(-1).mean() if flags.get("sum") else terms.mean()


def runs(options: set[str]) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Every loss path that the checkout has, as flags and as what they mean."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {
        "plain": (["--smoothing", "0"], {"smoothing": 0}),
        "smoothing": (["--smoothing", "0.2"], {"smoothing": 0.2}),
        "mixup": (["--mixup", "0.8", "--cutmix", "1.0"], {"mixup": True}),
        "mixup without prefetcher": (["--mixup", "0.8", "--no-prefetcher"], {"mixup": True}),
        "aug-splits": (["--aug-splits", "3", "--aa", "rand-m3-n1"], {}),
        "jsd": (["--jsd-loss", "--aug-splits", "3", "--aa", "rand-m3-n1"], {}),
        "bce": (["--bce-loss"], {"bce": True}),
        "bce mixup threshold": (
            ["--bce-loss", "--mixup", "0.8", "--bce-target-thresh", "0.2"],
            {"bce": True, "mixup": True, "threshold": 0.2},
        ),
        "bfloat16": (["--amp", "--amp-dtype", "bfloat16"], {}),
        "compiled": (["--torchcompile", "eager"], {}),
    }
    if "--bce-sum" in options:
        argv = ["--bce-loss", "--bce-sum", "--bce-pos-weight", "2"]
        found["bce sum weight"] = (argv, {"bce": True, "sum": True, "pos_weight": 2.0})
    if "--kd-distill-type" in options:
        for kind in ("logit", "feature"):
            argv = ["--kd-model-name", "resnet18", "--kd-distill-type", kind]
            found[f"distillation, {kind}"] = (argv, {})
    return found


def one(script: Path, argv: list[str], output: Path, launched: bool = True) -> Path:
    """Run once, and return the folder that it wrote."""
    seen.clear()
    logging.root.handlers.clear()
    torch._dynamo.reset()
    name = f"run{len(list(output.iterdir()))}"
    argv = [*COMMON, "--output", str(output), "--experiment", name, *argv]
    run_script(script, argv, transform=transform if launched else None)
    return output / name


def check(name: str, flags: dict[str, Any]) -> dict[str, Any]:
    worst = 0.0
    for logits, target, value in seen:
        wanted = by_hand(logits, target, flags)
        worst = max(worst, float((value.double() - wanted).abs() / wanted))
    return {"run": name, "steps": len(seen), "relative_error": worst}


def weights(folder: Path) -> dict[str, Tensor]:
    state = torch.load(folder / "last.pth.tar", weights_only=False, map_location="cpu")
    return dict(state["state_dict"])


def main(checkout: Path, data: Path, output: Path) -> None:
    script = checkout / "train.py"
    sys.path.insert(0, str(checkout))
    _teach_without_weights()
    source = script.read_text()
    options = {word.strip("'\",") for word in source.split() if word.strip("'\"").startswith("--")}
    options |= {part for part in ("--bce-sum", "--kd-distill-type") if part in source}
    where = ["--data-dir", str(data)]

    def attempt(name: str, body: Any) -> None:
        try:
            print(json.dumps({"run": name, **body()}), flush=True)
        except (Exception, SystemExit) as error:
            trace = traceback.format_exc(limit=-3)
            print(json.dumps({"run": name, "error": repr(error), "trace": trace}), flush=True)

    def path(name: str, argv: list[str], flags: dict[str, Any]) -> dict[str, Any]:
        try:
            one(script, [*where, "--loss", SPEC, *argv], output)
        except SystemExit:
            if fails_without_us(argv):
                return {"upstream_fails": True}
            raise
        return check(name, flags)

    def fails_without_us(argv: list[str]) -> bool:
        """Tell whether the script itself, unlaunched, cannot do this on this torch."""
        try:
            one(script, [*where, *argv], output, launched=False)
        except SystemExit:
            return True
        return False

    for name, (argv, flags) in runs(options).items():
        attempt(name, lambda n=name, a=argv, f=flags: path(n, a, f))

    def from_yaml_and_resumed() -> dict[str, Any]:
        config = output / "c.yaml"
        config.write_text(yaml.safe_dump({"loss": SPEC, "loss_schedule": "linear:warmup=0.5"}))
        first = one(script, [*where, "-c", str(config), "--epochs", "2"], output)
        saved = yaml.safe_load((first / "args.yaml").read_text())
        resume = ["-c", str(first / "args.yaml"), "--resume", str(first / "last.pth.tar")]
        try:
            again = one(script, [*where, *resume, "--epochs", "3"], output)
        except SystemExit:
            if fails_without_us([*resume[2:], "--epochs", "3"]):
                return {"upstream_fails": True, "saved": saved["loss"]}
            raise
        result = check("", {})  # past the warmup: the loss is the target's
        return {**result, "saved": saved["loss"], "epochs": len(_rows(again))}

    def identical() -> dict[str, Any]:
        torch.use_deterministic_algorithms(True)
        folders = [one(script, [*where], output, launched=ours) for ours in (False, True)]
        plain, launched = map(weights, folders)
        same_args = [(f / "args.yaml").read_text().replace(f.name, "") for f in folders]
        return {
            "identical": all(torch.equal(plain[n], launched[n]) for n in plain),
            "same_args": same_args[0] == same_args[1],
        }

    attempt("yaml, schedule, resume", from_yaml_and_resumed)
    attempt("bit-identical without --loss", identical)


def _rows(folder: Path) -> list[str]:
    return (folder / "summary.csv").read_text().splitlines()[1:]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
