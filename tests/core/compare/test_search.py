"""The search on a task whose every figure is known: stages, budget, workers, deaths."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

optuna = pytest.importorskip("optuna")
# ruff: noqa: E402

from rlo_core.compare.search import Plan, Search, SearchOptions, best_rates, plan_of
from rlo_core.compare.study import open_study, runs_of, take_over
from rlo_core.compare.task import CompareError, DivergedError, Task
from rlo_core.compare.verdict import UNSEEN, verdict_of
from rlo_core.errors import RunError

GAIN = {"ce": 0.0, "rlo:k=1": -0.04, "rlo:k=2": 0.06, "rlo:k=8": 0.01}
BEST = {"ce": 1, "rlo:k=1": 2, "rlo:k=2": 3, "rlo:k=8": 1}


class Known(Task):
    """Accuracy 0.7 plus the loss's gain, less 0.05 for each step from its own best rate."""

    host = "known"
    rates = (0.001, 0.003, 0.01, 0.03)
    default = 1

    def __init__(self, *, noise: float = 0.004, diverges: str = "", seconds: float = 0.0) -> None:
        self.noise, self.diverges, self.seconds = noise, diverges, seconds
        self.ran: list[tuple[str, float, int]] = []

    def describe(self) -> dict[str, Any]:
        return {"data": ["known"]}

    def check(self, loss: str) -> None:
        pass

    def run(self, loss: str, rate: float, seed: int) -> dict[str, Any]:
        time.sleep(self.seconds)
        self.ran.append((loss, rate, seed))
        if loss == self.diverges:
            raise DivergedError("on purpose")
        away = abs(self.rates.index(rate) - BEST[loss])
        shared = 0.03 * math.sin(seed * 7.0)  # what pairing takes out
        own = self.noise * math.sin(seed * 13.0 + len(loss) * 3 + GAIN[loss] * 100)
        accuracy = 0.7 + GAIN[loss] - 0.05 * away + shared + own
        return {
            "samples": 500, "accuracy": accuracy, "ce": 1.2 - accuracy, "miss": 1.1 - accuracy,
            "forward": [1.2 - accuracy] * 12, "ece": 0.1, "ece_scaled": 0.05,
            "sure_error": 0.2, "sure_samples": 250,
        }  # fmt: skip

    def apply(self, loss: str, rate: float, out: Path) -> dict[str, Any]:
        return {}


SETUP = {"losses": list(GAIN), "lr": list(Known.rates)}


def search(folder: Path, task: Known, **options: Any) -> Search:
    given = SearchOptions(losses=tuple(GAIN), **options)
    study = open_study(folder, storage=None, name="known", setup=SETUP)
    return Search(task, study, given, where=str(folder))


def test_the_best_loss_is_found_at_its_own_rate_and_compared_on_the_same_seeds(tmp_path: Path):
    task = Known()
    worker = search(tmp_path, task, seeds=4, trials=26)
    runs = worker.run()
    verdict = verdict_of(runs, task, worker.options)
    assert (verdict["best"], verdict["choice"], verdict["rate"]) == ("rlo:k=2", "rlo:k=2", 0.03)
    assert verdict["runs"] == len(set(task.ran)) == len(task.ran) <= 26
    assert set(runs[("rlo:k=2", 3)]) >= {0, 1, 2, 3}
    assert set(runs[("ce", 1)]) >= {0, 1, 2, 3}
    gain = next(d for d in verdict["differences"]
                if (d["loss"], d["metric"]) == ("rlo:k=2", "accuracy"))  # fmt: skip
    assert gain["low"] < 0.06 < gain["high"]
    assert gain["seen"] == 1
    assert "accuracy: rlo:k=2 is better than ce by" in verdict["sentences"][0]


def test_a_difference_within_the_noise_is_not_seen_and_ce_is_kept(tmp_path: Path) -> None:
    task = Known(noise=0.12)
    worker = search(tmp_path, task, seeds=3, trials=20)
    verdict = verdict_of(worker.run(), task, worker.options)
    assert verdict["choice"] == "ce"
    assert UNSEEN in verdict["summary"]
    assert all(UNSEEN in sentence for sentence in verdict["sentences"])


def test_a_finished_study_runs_nothing_again_and_a_larger_budget_goes_on(tmp_path: Path) -> None:
    search(tmp_path, Known(), seeds=2, trials=10).run()
    again = Known()
    search(tmp_path, again, seeds=2, trials=10).run()
    assert again.ran == []


def test_a_study_is_not_continued_with_another_grid(tmp_path: Path) -> None:
    open_study(tmp_path, storage=None, name="s", setup={"losses": ["ce"], "lr": [1, 2]})
    with pytest.raises(RunError) as caught:
        open_study(tmp_path, storage=None, name="s", setup={"losses": ["ce"], "lr": [1, 3]})
    assert str(caught.value) == (
        f"the study in {tmp_path / 'study.db'} was begun with other lr; "
        "give another --out (or --study), or the same options"
    )


def test_a_loss_that_diverges_is_counted_and_does_not_win(tmp_path: Path) -> None:
    task = Known(diverges="rlo:k=2")
    worker = search(tmp_path, task, seeds=2, trials=16)
    verdict = verdict_of(worker.run(), task, worker.options)
    assert verdict["best"] == "rlo:k=8"
    row = next(row for row in verdict["losses"] if row["loss"] == "rlo:k=2")
    assert row["diverged"] == verdict["diverged"] > 0


def test_nothing_is_compared_where_ce_diverges(tmp_path: Path) -> None:
    with pytest.raises(CompareError) as caught:
        search(tmp_path, Known(diverges="ce"), seeds=2, trials=16).run()
    assert str(caught.value) == (
        "ce diverged at every lr that was tried, so there is nothing to compare with; "
        "give --rate values that are smaller"
    )


def test_a_budget_too_small_for_two_seeds_says_what_is_enough(tmp_path: Path) -> None:
    with pytest.raises(CompareError) as caught:
        search(tmp_path, Known(), trials=5)
    assert str(caught.value) == (
        "a budget of 5 runs is too small for two seeds: 4 losses once each, and ce and the best "
        "other one again, are 6; give --trials 6 or more, or fewer losses"
    )
    with pytest.raises(CompareError) as caught:
        search(tmp_path, Known(seconds=0.3), minutes=0.02).run()
    assert str(caught.value).startswith("0.02 minutes are too few for two seeds: a run takes 0.3 s")
    assert str(caught.value).endswith("or fewer losses (the study is kept)")
    assert runs_of(open_study(tmp_path, storage=None, name="known", setup=SETUP))


@pytest.mark.parametrize("total", [10, 14, 18, 25, 40, 1000])
@pytest.mark.parametrize("losses", [2, 4, 8])
def test_a_plan_keeps_its_budget_and_two_seeds(total: int, losses: int) -> None:
    plan = plan_of(total, losses, 5)
    assert plan.seeds >= 2
    assert plan.search >= losses
    assert plan.search + (plan.others + 1) * (plan.seeds - 1) <= max(total, losses + 2)
    assert plan_of(1000, 8, 5) == Plan(982, 2, 5)


def test_rates_are_compared_on_the_seeds_that_they_share() -> None:
    easy, hard = {"miss": 0.1}, {"miss": 0.5}
    runs = {("ce", 0): {0: easy}, ("ce", 1): {0: {"miss": 0.05}, 1: hard, 2: hard}}
    runs = {c: {s: {**r, "sure_error": 0.0} for s, r in seeds.items()} for c, seeds in runs.items()}
    assert best_rates(runs, "symmetric")["ce"][0] == 1


WORKER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_search import Known, search
search(Path({folder!r}), Known(seconds={seconds}), seeds=3, trials=20).run()
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    tests = str(Path(__file__).parent)
    program = WORKER.format(tests=tests, folder=str(folder), seconds=seconds)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([sys.executable, "-c", program], env=environment)


def test_a_killed_workers_trial_is_taken_again_with_what_it_had_measured(tmp_path: Path) -> None:
    worker = start(tmp_path, 0.4)
    setup = SETUP
    state = optuna.trial.TrialState

    def running() -> list[Any]:
        if not (tmp_path / "study.db").exists():
            return []
        try:
            study = open_study(tmp_path, storage=None, name="known", setup=setup)
        except Exception:  # being made
            return []
        trials = study.get_trials(states=(state.RUNNING,))
        enough = sum(len(seeds) for seeds in runs_of(study).values()) >= 5
        return [t for t in trials if "worker" in t.user_attrs] if enough else []

    end = time.monotonic() + 300
    while not running():
        assert time.monotonic() < end
        time.sleep(0.3)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    study = open_study(tmp_path, storage=None, name="known", setup=setup)
    (dead,) = study.get_trials(states=(state.RUNNING,))
    before = {(c, s) for c, seeds in runs_of(study).items() for s in seeds}
    task = Known()
    follower = search(tmp_path, task, seeds=3, trials=20)
    runs = follower.run()
    done = {(loss, task.rates.index(rate), seed) for loss, rate, seed in task.ran}
    assert done.isdisjoint({(loss, rate, seed) for (loss, rate), seed in before})
    config = (dead.params["loss"], dead.params["rate"])
    assert runs[config]
    assert not study.get_trials(states=(state.RUNNING, state.WAITING))
    assert verdict_of(runs, task, follower.options)["best"] == "rlo:k=2"


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_of_a_living_worker_is_left_to_it(tmp_path: Path) -> None:
    study = open_study(tmp_path, storage=None, name="s", setup={"losses": ["ce"]})
    trial = study.ask()
    trial.set_user_attr("worker", {"machine": os.uname().nodename, "process": os.getpid()})
    assert take_over(study) == 0
    trial.set_user_attr("worker", {"machine": "another", "process": 2**22 - 1})
    assert take_over(study) == 0


@pytest.mark.slow
def test_two_workers_share_a_study_and_no_run_is_done_twice(tmp_path: Path) -> None:
    workers = [start(tmp_path, 0.2) for _ in range(2)]
    assert [worker.wait(300) for worker in workers] == [0, 0]
    study = open_study(tmp_path, storage=None, name="known", setup=SETUP)
    trials = study.get_trials(deepcopy=False)
    pids = {t.user_attrs["worker"]["process"] for t in trials if "worker" in t.user_attrs}
    assert len(pids) == 2
    runs = runs_of(study)
    seeds = [json.dumps([t.params, k]) for t in trials for k in t.user_attrs if k[:5] == "seed "]
    assert len(seeds) <= len(set(seeds)) + 1  # both may begin the same first trial
    assert (
        verdict_of(runs, Known(), SearchOptions(losses=tuple(GAIN), seeds=3))["best"] == "rlo:k=2"
    )


def test_a_full_disk_is_one_line_and_keeps_the_study(tmp_path: Path) -> None:
    worker = search(tmp_path, Known(), seeds=2, trials=20)
    engine = worker.study._storage._backend.engine  # the pages of the database are all there are
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

    @__import__("sqlalchemy").event.listens_for(engine, "connect")
    def small(connection: Any, _: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages + 1}")

    engine.dispose()
    with pytest.raises(CompareError) as caught:
        worker.run()
    assert str(caught.value) == (
        f"study {tmp_path}: database or disk is full; what it holds is kept, "
        "the same command goes on with it"
    )
    task = Known()
    runs = search(tmp_path, task, seeds=2, trials=20).run()
    assert verdict_of(runs, task, worker.options)["best"] == "rlo:k=2"


def test_a_storage_that_is_no_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompareError) as caught:
        open_study(tmp_path, storage="study.db", name="s", setup={"losses": ["ce"]})
    assert str(caught.value) == (
        "storage must be a database's URL such as sqlite:///study.db, got 'study.db'"
    )
