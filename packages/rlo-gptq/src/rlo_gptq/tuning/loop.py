"""Steps of Adam, the sequences held out, and a state on disk from which a run goes on."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rlo_core.links import CE, Link
from safetensors.torch import load_file
from torch import Tensor

from rlo_gptq.pipeline.processes import Processes
from rlo_gptq.pipeline.work_folder import WorkFolder
from rlo_gptq.settings import EndToEndSettings
from rlo_gptq.tuning.divergence import Target
from rlo_gptq.tuning.parameters import adam
from rlo_gptq.tuning.student import Student
from rlo_gptq.tuning.teacher import read_target
from rlo_gptq.tuning.text import batch_of

STATE = "state"
BEST = "best"
INTERRUPTED = "it was interrupted"
_WARM_UP = 0.05
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Outcome:
    """What the loop did.

    Args:
        history: What was measured at each evaluation; the first is the beginning.
        steps: Steps that were made.
        stopped: Why it ended before its last step; None if it did not.
    """

    history: list[dict[str, Any]]
    steps: int
    stopped: str | None

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation that is kept."""
        return min(self.history, key=lambda record: float(record["held_out_kl"]))


@dataclass
class Loop:
    """Tunes a student to targets that are on disk.

    Args:
        student: The packed model.
        sequences: Token ids, (count, tokens).
        held: How many of them, the last, are held out.
        settings: Steps, rate, batch.
        link: By whose slope tokens are weighted.
        work: Where targets, state and the best tensors are.
        processes: This process among its peers.
        note: Is told what was measured: at every step, and at every evaluation.
    """

    student: Student
    sequences: Tensor
    held: int
    settings: EndToEndSettings
    link: Link
    work: WorkFolder
    processes: Processes
    note: Callable[[dict[str, Any]], None]

    def run(self) -> Outcome:
        """Make all steps, or those that are left; the best tensors are in the work folder then."""
        settings, trained = self.settings, self.student.trained
        optimizer = adam(trained, settings.learning_rate)
        history: list[dict[str, Any]] = []
        begun = self._restore(optimizer)
        done = begun["step"]
        history += begun["history"]
        for record in history:
            self.note(record)
        if not history:
            history.append(self._evaluate(0, None))
            self._save(optimizer, 0, history, best=True)
        every = max(1, -(-settings.steps // settings.evaluations))
        stopped, losses = None, list(begun["losses"])
        with stop_signal() as wanted:
            while done < settings.steps:
                loss = self._step(optimizer, done)
                if not math.isfinite(loss):
                    stopped = f"the divergence was {loss} at step {done + 1}"
                    break
                done += 1
                losses.append(loss)
                self.note({"step": done, "kl": loss})
                stop = self._any(wanted())
                if done % every == 0 or done == settings.steps or stop:
                    full = done % every == 0 or done == settings.steps
                    best = False
                    if full:
                        record = self._evaluate(done, sum(losses) / len(losses))
                        best = record["held_out_kl"] < min(r["held_out_kl"] for r in history)
                        history.append(record)
                        losses = []
                    self._save(optimizer, done, history, best=best, losses=losses)
                if stop and done < settings.steps:
                    stopped = INTERRUPTED
                    break
        return Outcome(history, done, stopped)

    def _rate(self, step: int) -> float:
        """Return the factor of the learning rate: up over the first steps, then down to 0."""
        rising = max(1.0, _WARM_UP * self.settings.steps)
        return min((step + 1) / rising, 1.0) * max(0.0, 1 - step / self.settings.steps)

    def _any(self, wanted: bool) -> bool:
        """Return whether any process is to stop, in all of them."""
        flag = torch.tensor([float(wanted)])
        self.processes.sum_tensors([flag])
        return bool(flag.item())

    def _step(self, optimizer: torch.optim.Adam, done: int) -> float:
        """Make one step; return the mean divergence of its tokens, weighted."""
        settings = self.settings
        count = len(self.sequences) - self.held
        batch = batch_of(done, batch=settings.batch, count=count, seed=settings.seed)
        mine = [batch[i] for i in self.processes.share(len(batch))]
        targets = [self._target(number) for number in mine]
        tokens = len(batch) * self.sequences.shape[1]
        weights = [token_weights(target, self.link) / tokens for target in targets]
        total = self.student.gradients([self.sequences[n] for n in mine], targets, weights)
        gradients = [part.take_gradient() for part in self.student.trained]
        self.processes.sum_tensors([*gradients, total])
        if math.isfinite(float(total)):
            for group, part in zip(optimizer.param_groups, self.student.trained, strict=True):
                group["lr"] = settings.learning_rate * part.unit * self._rate(done)
            optimizer.step()
            for part in self.student.trained:
                part.write()
        return float(total)

    def _target(self, number: int) -> Target:
        return read_target(self.work, number, self.processes.device)

    def _evaluate(self, step: int, loss: float | None) -> dict[str, Any]:
        """Return the mean divergence, unweighted, of the sequences held out."""
        begin = time.perf_counter()
        first = len(self.sequences) - self.held
        sums = torch.zeros(self.held, dtype=torch.float64)
        mine = list(self.processes.share(self.held))
        for at in range(0, len(mine), self.settings.batch):  # no more hidden states than a step has
            rows = mine[at : at + self.settings.batch]
            sums[rows] = self.student.divergence(
                [self.sequences[first + row] for row in rows],
                [self._target(first + row) for row in rows],
            )
        self.processes.sum_tensors([sums])
        mean = float(sums.sum()) / (self.held * self.sequences.shape[1])
        record: dict[str, Any] = {"step": step, "held_out_kl": mean}
        if loss is not None:
            record["mean_kl"] = loss
        self.note({**record, "seconds": round(time.perf_counter() - begin, 3)})
        return record

    def _save(
        self,
        optimizer: torch.optim.Adam,
        step: int,
        history: list[dict[str, Any]],
        *,
        best: bool,
        losses: Sequence[float] = (),
    ) -> None:
        """Put on disk all that the next step depends on; the best tensors before it."""
        if self.processes.first:
            trained = self.student.trained
            if best:
                self.work.save(BEST, {part.name: part.stored() for part in trained}, [])
            tensors = {}
            for part in trained:
                tensors[f"{part.name}.theta"] = part.theta
                for name, value in optimizer.state.get(part.theta, {}).items():
                    tensors[f"{part.name}.{name}"] = value
            record = {"step": step, "history": history, "losses": list(losses)}
            # In the same file, so that it is never there without the tensors it tells of.
            text = json.dumps(record).encode()
            tensors["record"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self.work.save(STATE, tensors, [])
        self.processes.wait()

    def _restore(self, optimizer: torch.optim.Adam) -> dict[str, Any]:
        """Go back to the state on disk; return its record, that of a beginning without one."""
        exists = self.processes.broadcast({"exists": self.work.has(STATE)}, 0)["exists"]
        if not exists:
            return {"step": 0, "history": [], "losses": []}
        found = load_file(self.work.part(STATE), device=str(self.processes.device))
        record: dict[str, Any] = json.loads(bytes(found["record"].tolist()))
        for part in self.student.trained:
            with torch.no_grad():
                part.theta.copy_(found[f"{part.name}.theta"])
            part.write()
            if f"{part.name}.step" in found:
                state = {name: found[f"{part.name}.{name}"] for name in _MOMENTS}
                optimizer.state[part.theta] = {**state, "step": state["step"].cpu()}
        return record


def token_weights(target: Target, link: Link) -> Tensor:
    """Return the weights of a sequence's tokens, (tokens,), mean 1: the slope of a loss.

    At the dense model's cross entropy, so that they stay as they are; the last token, which nothing
    follows, weighs as much as the others do in the mean.
    """
    if isinstance(link, CE):
        return torch.ones_like(target.ce)
    slope = link.slope(target.ce)
    slope[-1] = slope[:-1].mean()
    mean: Tensor = slope.mean().clamp(min=1e-30)
    return slope / mean


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; pressed again it ends the program.

    A step is finished first, so that what was learnt can be kept.
    """
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
