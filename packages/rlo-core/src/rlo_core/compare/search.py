"""The search: every loss once, the sampler's proposals, the best ones' own rates, then all seeds.

The resource of successive halving is seeds: a trial trains its seeds one after the other, and stops
where it is not among the better third. In the end `ce` and the best others, each at a rate that is
better than its neighbours in the grid, have the same seeds, and only these are compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from rlo_core.compare.measures import criterion_value
from rlo_core.compare.study import (
    GRACE,
    Config,
    Runs,
    import_optuna,
    runs_of,
    storage_errors,
    take_over,
    this_worker,
)
from rlo_core.compare.task import CompareError, DivergedError, Task

if TYPE_CHECKING:
    import optuna

BASE = "ce"
FINALISTS = 2
"""How many losses besides `ce` get all seeds."""


@dataclass(frozen=True)
class SearchOptions:
    """What a comparison may cost, and by what it judges.

    Args:
        losses: Spec strings; `ce` is one of them.
        seeds: Seeds of the last stage, at least 2.
        criterion: One of `rlo_core.compare.measures.CRITERIA`.
        trials: The most runs (trainings), over all workers; None for a quarter of the full grid.
        minutes: The most minutes of training, over all workers; None for no limit.
    """

    losses: tuple[str, ...]
    seeds: int = 5
    criterion: str = "symmetric"
    trials: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise CompareError(f"seeds must be at least 2, got {self.seeds}")
        if BASE not in self.losses or len(set(self.losses)) < 2:
            raise CompareError(
                f"a comparison needs ce and at least one other loss, got {', '.join(self.losses)}"
            )
        if self.trials is not None and self.trials < self.fewest:
            raise CompareError(
                f"a budget of {self.trials} runs is too small for two seeds: {len(self.losses)} "
                f"losses once each, and ce and the best other one again, are {self.fewest}; give "
                f"--trials {self.fewest} or more, or fewer losses"
            )

    @property
    def fewest(self) -> int:
        """The runs that a comparison needs: each loss once, two of them again."""
        return len(self.losses) + 2


@dataclass(frozen=True)
class Plan:
    """How a budget of runs is spent: until `search` are used, then `others` and ce with `seeds`."""

    search: int
    others: int
    seeds: int


def plan_of(total: float, losses: int, seeds: int) -> Plan:
    """Return how a budget is spent; fewer finalists first, then fewer seeds, where it is small."""
    for others in (*range(min(FINALISTS, losses - 1), 1, -1), 1):
        for count in (seeds, *(() if others > 1 else range(seeds - 1, 1, -1))):
            last = (others + 1) * (count - 1) + 2 * (others + 1)  # the seeds, and rates beside
            if total - last >= losses:
                return Plan(int(min(total - last, 10**9)), others, count)
    return Plan(losses, 1, 2)


class Search:
    """One worker of a comparison."""

    def __init__(
        self,
        task: Task,
        study: optuna.Study,
        options: SearchOptions,
        *,
        where: str,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.task, self.study, self.options = task, study, options
        self.where, self.say = where, say
        self.misses = 0

    def run(self) -> Runs:
        """Work until the comparison is done; return all that was measured, by every worker.

        Raises:
            CompareError: the budget is too small, or the database fails; the study is kept.
        """
        with storage_errors(self.where):
            taken = take_over(self.study)
            if taken:
                self.say(f"{taken} trials of workers that died are taken again")
            self._enqueue([(loss, self.task.default) for loss in self.options.losses], "first")
            while True:
                waiting, running = self._states()
                if not waiting:
                    step = self._next(running)
                    if step == "done":
                        return runs_of(self.study)
                    if step == "wait":
                        self._wait()
                        continue
                self.study.optimize(self._objective, n_trials=1)

    def _states(self) -> tuple[bool, bool]:
        """Return whether trials wait, and whether other workers' trials are running."""
        state = import_optuna().trial.TrialState
        trials = self.study.get_trials(deepcopy=False, states=(state.WAITING, state.RUNNING))
        waiting = any(trial.state == state.WAITING for trial in trials)
        return waiting, any(trial.state == state.RUNNING for trial in trials)

    def _wait(self) -> None:
        """Wait for other workers; one that dies meanwhile has its trial taken again."""
        time.sleep(min(2.0, GRACE / 4))
        take_over(self.study)
        import_optuna().storages.fail_stale_trials(self.study)

    def _enqueue(self, configs: Sequence[Config], stage: str, *, seeds: int | None = None) -> None:
        known = {
            (trial.params.get("loss") or fixed(trial).get("loss"),
             trial.params.get("rate", fixed(trial).get("rate")),
             trial.user_attrs.get("stage"))
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state.name != "FAIL"
        }  # fmt: skip
        for loss, rate in configs:
            if (loss, rate, stage) in known:
                continue
            attributes: dict[str, Any] = {"stage": stage}
            if seeds is not None:
                attributes["seeds"] = seeds
            self.study.enqueue_trial({"loss": loss, "rate": rate}, user_attrs=attributes)

    def _next(self, running: bool) -> Literal["sample", "wait", "done"]:
        """Decide what comes next where nothing waits; may enqueue, and then it is "sample"."""
        runs = runs_of(self.study)
        plan = plan_of(self._total(runs), len(self.options.losses), self.options.seeds)
        used = sum(len(seeds) for seeds in runs.values())
        untried = [
            (loss, rate)
            for loss in self.options.losses
            for rate in range(len(self.task.rates))
            if (loss, rate) not in runs
        ]
        if used < plan.search and untried and not self._finals():
            if self.misses >= 3:  # the sampler insists on what is known
                self.misses = 0
                self._enqueue([untried[used % len(untried)]], "search")
            return "sample"
        if running:
            return "wait"
        if not self._finals():
            finalists = self._finalists(runs, plan.others)
            beside = [
                (loss, near)
                for loss, rate in finalists
                for near in (rate - 1, rate + 1)
                if 0 <= near < len(self.task.rates) and (loss, near) not in runs
            ]
            if beside and used + len(beside) + len(finalists) <= self._total(runs):
                self._enqueue(beside, "rate")
                return "sample"
            self._enqueue(finalists, "final", seeds=self._affordable(runs, finalists, plan))
            return "sample" if self._states()[0] else "done"
        return "done"

    def _affordable(self, runs: Runs, finalists: list[Config], plan: Plan) -> int:
        """Return the seeds that what is left of the budget pays for, at least 2."""
        left = self._total(runs) - sum(len(seeds) for seeds in runs.values())
        seeds = self.options.seeds
        while seeds > 2 and sum(max(0, seeds - len(runs[config])) for config in finalists) > left:
            seeds -= 1
        return seeds

    def _finals(self) -> bool:
        return any(
            trial.user_attrs.get("stage") == "final" and trial.state.name != "FAIL"
            for trial in self.study.get_trials(deepcopy=False)
        )

    def _finalists(self, runs: Runs, others: int) -> list[Config]:
        """Return ce and the best others, each at its best rate."""
        best = best_rates(runs, self.options.criterion)
        if BASE not in best:
            raise CompareError(
                f"ce diverged at every {self.task.rate_name} that was tried, so there is nothing "
                "to compare with; give --rate values that are smaller"
            )
        ranked = sorted((value, loss) for loss, (_, value) in best.items() if loss != BASE)
        kept = [BASE, *(loss for _, loss in ranked[:others])]
        if len(kept) == 1:
            raise CompareError(
                "every loss but ce diverged; give --rate values that are smaller, or other losses"
            )
        return [(loss, best[loss][0]) for loss in kept]

    def _total(self, runs: Runs) -> float:
        """Return the budget in runs; minutes by what a run took so far."""
        options = self.options
        grid = len(options.losses) * len(self.task.rates) * options.seeds
        total: float = options.trials or (
            math.inf if options.minutes else max(options.fewest, math.ceil(grid / 4))
        )
        seconds = [r["seconds"] for seeds in runs.values() for r in seeds.values()]
        if options.minutes is not None and seconds:
            total = min(total, options.minutes * 60 / max(fmean(seconds), 1e-9))
            if total < options.fewest:
                needed = math.ceil(fmean(seconds) * options.fewest / 6) / 10
                raise CompareError(
                    f"{options.minutes:g} minutes are too few for two seeds: a run takes "
                    f"{fmean(seconds):.1f} s, and {len(options.losses)} losses need "
                    f"{options.fewest} runs; give --minutes {needed:g} or more, or fewer losses "
                    "(the study is kept)"
                )
        return total

    def _objective(self, trial: optuna.Trial) -> float:
        optuna = import_optuna()
        loss = trial.suggest_categorical("loss", list(self.options.losses))
        rate = trial.suggest_int("rate", 0, len(self.task.rates) - 1)
        stage = trial.user_attrs.get("stage", "search")
        trial.set_user_attr("worker", this_worker())
        trial.set_user_attr("stage", stage)
        runs = runs_of(self.study)
        done = runs.get((loss, rate), {})
        twin = any(
            other.number < trial.number
            and other.params == trial.params
            and (stage != "final" or other.user_attrs.get("stage") == "final")
            and other.state in (optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.COMPLETE)
            for other in self.study.get_trials(deepcopy=False)
        )
        if twin or (stage == "search" and done and "deaths" not in trial.user_attrs):
            self.misses += 1
            raise optuna.TrialPruned("it is known")
        self.misses = 0
        seeds = int(trial.user_attrs.get("seeds", self.options.seeds))
        values: list[float] = []
        for seed in range(seeds):
            record = done.get(seed)
            if record is None:
                if values and stage != "final" and self._spent():
                    raise optuna.TrialPruned("the search is over")
                record = self._measure(loss, rate, seed)
                trial.set_user_attr(f"seed {seed}", record)
            values.append(self._judge(record, runs))
            trial.report(fmean(values), step=seed + 1)
            if stage != "final" and trial.should_prune():
                raise optuna.TrialPruned
            if record.get("diverged"):
                break
        return fmean(values)

    def _spent(self) -> bool:
        runs = runs_of(self.study)
        used = sum(len(seeds) for seeds in runs.values())
        return (
            used >= plan_of(self._total(runs), len(self.options.losses), self.options.seeds).search
        )

    def _judge(self, record: dict[str, Any], runs: Runs) -> float:
        return criterion_value(record, self.options.criterion, noise_share(runs))

    def _measure(self, loss: str, rate: int, seed: int) -> dict[str, Any]:
        value = self.task.rates[rate]
        started = time.perf_counter()
        try:
            record = self.task.run(loss, value, seed)
            if not all(math.isfinite(record[name]) for name in ("ce", "miss")):
                record = {"diverged": True}
        except DivergedError:
            record = {"diverged": True}
        record["seconds"] = round(time.perf_counter() - started, 4)
        said = "diverged" if record.get("diverged") else f"accuracy {record['accuracy']:.4f}"
        self.say(f"{loss}, {self.task.rate_name} {value:g}, seed {seed}: {said}")
        return record


def fixed(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return the parameters that a waiting trial was put there with."""
    return dict(trial.system_attrs.get("fixed_params", {}))


def noise_share(runs: Runs) -> float:
    """Return ce's disagreement with the labels among its more confident half, a first guess."""
    found = [
        record["sure_error"]
        for (loss, _), seeds in runs.items()
        for record in seeds.values()
        if loss == BASE and not record.get("diverged")
    ]
    return fmean(found) if found else 0.0


def best_rates(runs: Runs, criterion: str) -> dict[str, tuple[int, float]]:
    """Return for each loss that has one its best rate and the criterion there.

    Where rates have run other seeds, those that all have are compared first: a rate counts by its
    mean over the seeds that the loss's most-run rate shares with it.
    """
    noise = noise_share(runs)
    best: dict[str, tuple[int, float]] = {}
    for loss in dict.fromkeys(loss for loss, _ in runs):
        rates = {rate: seeds for (name, rate), seeds in runs.items() if name == loss}
        shared = set.intersection(*(set(seeds) for seeds in rates.values()))
        found = []
        for rate, seeds in rates.items():
            used = [seeds[s] for s in (shared or seeds)]
            value = fmean(criterion_value(record, criterion, noise) for record in used)
            if math.isfinite(value) and not any(r.get("diverged") for r in seeds.values()):
                found.append((value, rate))
        if found:
            value, rate = min(found)
            every = [criterion_value(r, criterion, noise) for r in rates[rate].values()]
            best[loss] = (rate, fmean(every))
    return best
