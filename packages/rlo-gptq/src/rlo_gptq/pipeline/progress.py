"""What is told of a quantization while it goes on: a log, and a progress bar on a terminal."""

from __future__ import annotations

from typing import Any, Protocol


class Progress(Protocol):
    """What is told of the progress."""

    def block(self, index: int, count: int, status: str) -> None:
        """A block begins: "quantize", or "replay" for one that is finished already."""

    def layer(self, record: dict[str, Any]) -> None:
        """A layer is quantized."""

    def tuned(self, record: dict[str, Any]) -> None:
        """A block is finetuned."""


class Log:
    """Writes every layer into `metrics.jsonl` and shows nothing."""

    def __init__(self, runs: list[Any]) -> None:
        self.runs = runs
        self.index = 0

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def block(self, index: int, count: int, status: str) -> None:
        """A block begins."""

    def layer(self, record: dict[str, Any]) -> None:
        """A layer is there."""
        for run in self.runs:
            run.log(step=self.index, kind=record["layer"].rpartition(".")[2], **record)
        self.index += 1

    def tuned(self, record: dict[str, Any]) -> None:
        """A block is finetuned."""
        for run in self.runs:
            run.log(step=self.index, kind="block", **record)
        self.index += 1

    def step(self, record: dict[str, Any], count: int) -> None:
        """A step of tuning was made, or the sequences held out were looked at."""
        for run in self.runs:
            run.log(**record)


class Bar(Log):
    """The same, and a progress bar with the last layer's error and time on stderr."""

    def __init__(self, runs: list[Any]) -> None:
        super().__init__(runs)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[at]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task("prepare", total=None, at="")

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            total = self.bar.tasks[self.task].total
            self.bar.update(self.task, completed=total, description="done", at="")
        self.bar.stop()

    def block(self, index: int, count: int, status: str) -> None:
        """Move the bar."""
        at = f"block {index + 1} of {count}"
        self.bar.update(self.task, completed=index, total=count, description=status, at=at)

    def layer(self, record: dict[str, Any]) -> None:
        """Print the layer above the bar."""
        super().layer(record)
        self.bar.console.print(
            f"{record['layer']:48} {record['rows']:>6} x {record['columns']:<6} proxy loss "
            f"{record['proxy']:.5f}  {record['seconds']:.2f} s"
        )

    def tuned(self, record: dict[str, Any]) -> None:
        """Print the block above the bar."""
        super().tuned(record)
        self.bar.console.print(
            f"{record['block']:48} tuned: error {record['error_before']:.5f} -> "
            f"{record['error_after']:.5f}  {record['seconds']:.2f} s"
        )

    def step(self, record: dict[str, Any], count: int) -> None:
        """Move the bar, and print the divergence of the sequences held out above it."""
        super().step(record, count)
        at = f"step {record['step']} of {count}"
        self.bar.update(self.task, completed=record["step"], total=count, description="tune", at=at)
        if "held_out_kl" in record:
            self.bar.console.print(f"{at:20} held-out KL divergence {record['held_out_kl']:.5f}")
