"""The cost of an epoch: timm's own train.py and `rlo-timm train`; `results/timm_epoch.jsonl`.

`python benchmarks/bench_timm_epoch.py --data FOLDER --timm-checkout DIR` trains a small net of
timm (`--model`) on the first CIFAR-10 images of the parquet files in FOLDER with both commands and
the same options: crop and flip, SGD with momentum, cosine schedule, validation and checkpoint after
every epoch, one worker process, one thread each. An epoch's time is the CPU time of a run of many
epochs less that of a run of one, over the epochs between: imports and start-up cancel out.
Rounds are interleaved.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import click
from harness import write_results
from timm_doors import unpack


def cpu_seconds(command: list[str], folder: Path) -> float:
    """Run a command with one thread; return the processor time of it and of its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--timm-checkout", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--work", type=click.Path(path_type=Path), default="runs/timm_epoch")
@click.option("--model", default="test_resnet", show_default=True, help="A small net of timm.")
@click.option("--train", default=2048, show_default=True)
@click.option("--val", default=512, show_default=True)
@click.option("--epochs", default=4, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(
    data: Path,
    timm_checkout: Path,
    work: Path,
    model: str,
    train: int,
    val: int,
    epochs: int,
    rounds: int,
) -> None:
    work = work.resolve()
    images, output = work / f"cifar-{train}-{val}", work / "runs"
    unpack(data, images, {"train": train, "validation": val})
    shared = "-b 64 --opt momentum --lr 0.05 --weight-decay 0 --sched cosine --warmup-epochs 0"
    shared += " --workers 1 --seed 0 --device cpu --smoothing 0 --num-classes 10"
    host = f"--model {model} --data-dir {images} --img-size 32 --mean 0.4914 0.4822 0.4465"
    host += " --std 0.2471 0.2435 0.2616 --train-crop-mode rrc --color-jitter 0"
    ours = f"--net {model} --dataset {images} --size 32 --train-crop-mode rrc"
    commands = {
        "timm train.py": [sys.executable, "train.py", *shared.split(), *host.split()],
        "timm train.py --loss rlo": [
            *[sys.executable, "-m", "rlo_timm", "train.py", *shared.split(), *host.split()],
            *["--loss", "rlo:k=3,m=3"],
        ],
        "rlo-timm train --loss ce": [
            *[sys.executable, "-m", "rlo_timm", "train", *shared.split(), *ours.split()],
            *["--loss", "ce"],
        ],
        "rlo-timm train": [
            *[sys.executable, "-m", "rlo_timm", "train", *shared.split(), *ours.split()],
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            times = []
            for count in (1, epochs):
                shutil.rmtree(output, ignore_errors=True)
                place = ["--output"] if "train.py" in command else ["--out"]
                run = [*command, "--epochs", str(count), *place, str(output)]
                times.append(cpu_seconds(run, timm_checkout))
            seconds[name].append((times[1] - times[0]) / (epochs - 1))
            print(name, round(seconds[name][-1], 3), flush=True)
    base = statistics.median(seconds["timm train.py"])
    records = [
        {
            "command": name,
            "model": model,
            "train": train,
            "val": val,
            "epochs": epochs,
            "cpu_seconds_an_epoch": sorted(times),
            "median": statistics.median(times),
            "over_timm": statistics.median(times) / base,
        }
        for name, times in seconds.items()
    ]
    for record in records:
        print(record)
    write_results("timm_epoch", records)


if __name__ == "__main__":
    main()
