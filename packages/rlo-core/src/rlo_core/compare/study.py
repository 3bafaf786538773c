"""The Optuna study of a comparison: its storage, what its trials have measured, whose died.

A trial is one loss at one rate (an index into the grid); each seed that it has run is in its user
attributes, so that a trial which is taken again does not train what was trained, and a study that
was killed goes on where it was.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlo_core.compare.task import CompareError
from rlo_core.errors import RunError

if TYPE_CHECKING:
    import optuna

STUDY_FILE = "study.db"
HEARTBEAT, GRACE = 20, 80
"""Seconds: how often a worker says that it lives, and after how many without it its trial is taken
again. A dead process of the same machine is seen at once."""
RETRIES = 3

Config = tuple[str, int]
Runs = dict[Config, dict[int, dict[str, Any]]]


def import_optuna() -> Any:
    """Return the module optuna.

    Raises:
        CompareError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import optuna
    except ModuleNotFoundError as error:
        raise CompareError(
            f"a comparison needs {error.name}; install it with `pip install 'rlo-core[compare]'`"
        ) from error
    optuna.logging.set_verbosity(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Say in one line what a database cannot do: a full disk, a server that is away."""
    optuna = import_optuna()
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        if isinstance(error, ArgumentError):
            raise CompareError(
                f"storage must be a database's URL such as sqlite:///study.db, got {where!r}"
            ) from error
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        said = str(getattr(reason, "orig", None) or reason).splitlines()[0]
        raise CompareError(
            f"study {where}: {said}; what it holds is kept, the same command goes on with it"
        ) from error


def open_study(
    folder: Path, *, storage: str | None, name: str, setup: dict[str, Any], seed: int = 0
) -> optuna.Study:
    """Open the study of a comparison, or begin it.

    Args:
        folder: Where `study.db` is, without a `storage`.
        storage: A database's URL; any number of workers may use it at once.
        name: The study's name in the database.
        setup: What its figures depend on; the study is continued with the same only.
        seed: Of the sampler.

    Raises:
        RunError: the study was begun with another setup; says what differs.
        CompareError: optuna is missing, or the database cannot be used.
    """
    library = import_optuna()
    url = storage
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{(folder / STUDY_FILE).resolve()}"
    where = storage or str(folder / STUDY_FILE)
    with storage_errors(where):
        engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        try:
            database = library.storages.RDBStorage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=retry,
            )
        except ImportError as error:
            raise CompareError(
                f"storage {url.partition(':')[0]!r} needs {error.name or error}: pip install it"
            ) from error
        study = library.create_study(
            study_name=name,
            storage=database,
            sampler=library.samplers.TPESampler(
                seed=seed + os.getpid() % 1000 if storage else seed,
                n_startup_trials=len(setup["losses"]),
                multivariate=True,
                constant_liar=True,
            ),
            pruner=library.pruners.SuccessiveHalvingPruner(
                min_resource=1, reduction_factor=3, bootstrap_count=len(setup["losses"])
            ),
            load_if_exists=True,
        )
        known = study.user_attrs.get("setup")
        if known is None:
            study.set_user_attr("setup", setup)
        elif known != json.loads(json.dumps(setup)):
            differing = sorted(
                key
                for key in {*known, *setup}
                if known.get(key) != json.loads(json.dumps(setup.get(key)))
            )
            raise RunError(
                f"the study in {where} was begun with other {', '.join(differing)}; "
                "give another --out (or --study), or the same options"
            )
    return cast("optuna.Study", study)


def retry(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Put a dead worker's trial back, with what it had measured; after three deaths give it up."""
    optuna = import_optuna()
    again = int(trial.user_attrs.get("deaths", 0)) + 1
    if again > RETRIES:
        return
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.WAITING,
            system_attrs={"fixed_params": trial.params},
            user_attrs={**trial.user_attrs, "deaths": again},
        )
    )


def take_over(study: optuna.Study) -> int:
    """Put back the trials of processes of this machine that are gone; return how many."""
    optuna = import_optuna()
    running = optuna.trial.TrialState.RUNNING
    taken = 0
    for trial in study.get_trials(deepcopy=False, states=(running,)):
        worker = trial.user_attrs.get("worker")
        if not worker or worker["machine"] != platform.node() or _alive(worker["process"]):
            continue
        try:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        except (ValueError, RuntimeError):  # another worker was quicker
            continue
        retry(study, trial)
        taken += 1
    return taken


def this_worker() -> dict[str, Any]:
    """Return who runs a trial."""
    return {"machine": platform.node(), "process": os.getpid()}


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def runs_of(study: optuna.Study) -> Runs:
    """Return what was measured: for each loss and rate, by seed."""
    found: Runs = {}
    for trial in study.get_trials(deepcopy=False):
        if "loss" not in trial.params:
            continue
        config = (str(trial.params["loss"]), int(trial.params["rate"]))
        for key, record in trial.user_attrs.items():
            if key.startswith("seed "):
                found.setdefault(config, {})[int(key[5:])] = record
    return found
