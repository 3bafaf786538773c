"""ResNet-18 (CIFAR stem) on CIFAR-10, ce and rlo, through both doors; `results/timm_doors.jsonl`.

`python benchmarks/timm_doors.py --data FOLDER --timm-checkout DIR` takes the first images of the
parquet files in FOLDER (`train*`, `test*`), trains with timm's own train.py through the launcher
and with `rlo-timm train`, the same options in both: Adam 1e-3, batch 32, no augmentation, cosine
per epoch. `--work` keeps the runs; those that are there are not done again.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
from harness import write_results
from PIL import Image
from rlo_core.runs.record import read_run

LOSSES = {"ce": "ce", "rlo": "rlo:k=3,m=3"}


def unpack(data: Path, target: Path, limits: dict[str, int]) -> None:
    """Write the first images as class folders, for train.py's default reader."""
    for split, pattern in (("train", "train*.parquet"), ("validation", "test*.parquet")):
        if (target / split).is_dir():
            continue
        table = pq.read_table(sorted(data.glob(pattern))[0]).slice(0, limits[split])
        for i, row in enumerate(table.to_pylist()):
            folder = target / split / str(row["label"])
            folder.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(row["img"]["bytes"])).save(folder / f"{i:05d}.png")


def launched(name: str, spec: str, checkout: Path, work: Path, epochs: int) -> dict[str, Any]:
    summary = work / "door1" / name / "summary.csv"
    if not summary.is_file():
        argv = f"--model resnet18_cifar --num-classes 10 -b 32 --epochs {epochs} --warmup-epochs 0"
        argv += " --opt adam --lr 1e-3 --weight-decay 0 --smoothing 0 --no-aug --device cpu"
        argv += f" --workers 1 --seed 0 --data-dir {work / 'cifar'} --output {work / 'door1'}"
        command = [sys.executable, "-m", "rlo_timm", "train.py", *argv.split()]
        command += ["--loss", spec, "--experiment", name]
        subprocess.run(command, check=True, cwd=checkout)
    with summary.open() as file:
        last = list(csv.DictReader(file))[-1]
    return {
        "acc1": float(last["eval_top1"]) / 100,
        "acc5": float(last["eval_top5"]) / 100,
        "ce": float(last["eval_loss"]),
    }


def built_in(
    name: str, spec: str, data: Path, work: Path, epochs: int, limits: dict[str, int]
) -> dict[str, Any]:
    out = work / "door2" / name
    if not (out / "model.safetensors").is_file():
        argv = "--net res18 -b 32 --lr 1e-3 --no-augment --device cpu --workers 1 --seed 0 "
        argv += f"--epochs {epochs} --train-limit {limits['train']} "
        argv += f"--val-limit {limits['validation']} --dataset {data} --out {out} --json"
        command = [sys.executable, "-m", "rlo_timm", "train", *argv.split(), "--loss", spec]
        subprocess.run(command, check=True)
    summary = read_run(out)["summary"]
    return {name: summary[name] for name in ("acc1", "acc5", "ce")}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--timm-checkout", type=click.Path(path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), default="runs/timm_doors")
@click.option("--train", default=1024, show_default=True)
@click.option("--val", default=512, show_default=True)
@click.option("--epochs", default=2, show_default=True)
def main(data: Path, timm_checkout: Path, work: Path, train: int, val: int, epochs: int) -> None:
    limits = {"train": train, "validation": val}
    work = work.resolve()
    unpack(data, work / "cifar", limits)
    records = []
    for name, spec in LOSSES.items():
        doors = {
            "timm train.py": launched(name, spec, timm_checkout, work, epochs),
            "rlo-timm train": built_in(name, spec, data.resolve(), work, epochs, limits),
        }
        for door, measured in doors.items():
            error = (measured["acc1"] * (1 - measured["acc1"]) / val) ** 0.5
            record = {"door": door, "loss": spec, "epochs": epochs, "train": train, "val": val}
            records.append({**record, **measured, "acc1_standard_error": error, "seeds": 1})
            print(records[-1])
    write_results("timm_doors", records)


if __name__ == "__main__":
    main()
