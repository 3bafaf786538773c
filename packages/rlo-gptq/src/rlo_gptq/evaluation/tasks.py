"""Tasks through lm-eval."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlo_gptq.evaluation.open_model import EvaluationError, open_model

if TYPE_CHECKING:
    pass


def check_lm_eval() -> None:
    """Raise EvaluationError with the way out if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(
            "--tasks needs lm-eval; install it with: pip install 'rlo-gptq[lm-eval]'"
        )


def evaluate_tasks(
    name: str,
    tasks: Sequence[str],
    *,
    limit: int | None,
    device: str,
    dtype: str,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Return lm-eval's results for a model: for each task its metrics.

    Args:
        name: A folder or hub name, quantized by us or not.
        tasks: Names of tasks.
        limit: Examples of each task; None for all.
        device: "auto", "cpu", "cuda", ...
        dtype: Of weights that are not packed, and of activations.
        include_path: A folder with YAML files of further tasks.

    Raises:
        EvaluationError: lm-eval is not installed, or a task fails.
    """
    check_lm_eval()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer, _ = open_model(name, device=device, dtype=dtype)
    try:
        results = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=list(tasks),
            limit=limit,
            task_manager=TaskManager(include_path=None if include_path is None else [include_path]),
            bootstrap_iters=0,  # their spread takes minutes and is not asked for
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise EvaluationError(f"lm-eval failed: {' '.join(str(error).split())[:300]}") from error
    found: dict[str, Any] = json.loads(json.dumps(results["results"], default=str))
    return found
