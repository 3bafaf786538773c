"""A trained network as timm and the hub know one: `model.safetensors` beside `config.json`."""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rlo_core.errors import RunError
from torch import nn

from rlo_timm._compat import save_for_hf
from rlo_timm.trainer.loaders import Inputs
from rlo_timm.trainer.plan import check_push

WEIGHTS, MODEL_CONFIG = "model.safetensors", "config.json"


def describe_inputs(net: nn.Module, inputs: Inputs) -> None:
    """Make a network's own configuration say what its images are to be."""
    config: dict[str, Any] = dict(net.pretrained_cfg)  # type: ignore[arg-type]
    config |= data_config(inputs) | {"test_input_size": None, "test_crop_pct": None}
    net.pretrained_cfg = net.default_cfg = config  # type: ignore[assignment]


def data_config(inputs: Inputs) -> dict[str, Any]:
    """Return timm's description of images."""
    return {
        "input_size": (3, inputs.size, inputs.size),
        "mean": inputs.mean,
        "std": inputs.std,
        "interpolation": inputs.interpolation,
        "crop_pct": inputs.crop_pct,
    }


def save_model(
    net: nn.Module,
    folder: Path,
    *,
    inputs: Inputs,
    options: dict[str, Any],
    classes: list[str],
) -> None:
    """Write weights and configuration that `timm.create_model("local-dir:FOLDER")` loads.

    Args:
        net: A network made by timm.
        folder: Where to.
        inputs: What its images are to be.
        options: The keywords that it was made with.
        classes: Their names.
    """
    save = save_for_hf()
    known = inspect.signature(save).parameters
    more = {"data_config": data_config(inputs)} if "data_config" in known else {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".model.") as temporary:
        save(
            net,
            temporary,
            model_config={"label_names": classes},
            model_args=options,
            safe_serialization=True,
            **more,
        )
        for name in (WEIGHTS, MODEL_CONFIG):
            os.replace(Path(temporary) / name, folder / name)


def push(run: Path, repository: str, *, private: bool = False) -> str:
    """Upload a finished run's model, report and numbers to the hub.

    Args:
        run: A run folder.
        repository: OWNER/NAME; made if it is not there.
        private: Of a repository that is made.

    Returns:
        Its address.

    Raises:
        RunError: the run has no model, there is no token, or the hub did not take it.
    """
    from huggingface_hub import HfApi

    if not (run / WEIGHTS).is_file() or not (run / MODEL_CONFIG).is_file():
        raise RunError(f"{str(run)!r} has no {WEIGHTS} and {MODEL_CONFIG}: it is not finished")
    check_push(repository)
    api = HfApi(library_name="timm")
    with tempfile.TemporaryDirectory() as temporary:
        for name in (WEIGHTS, MODEL_CONFIG, "run.json", "metrics.jsonl"):
            if (run / name).is_file():
                shutil.copyfile(run / name, Path(temporary) / name)
        (Path(temporary) / "README.md").write_text(_card(repository), encoding="utf-8")
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=address.repo_id,
                folder_path=temporary,
                commit_message="Trained with rlo-timm",
            )
        except OSError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"the hub did not take {repository!r}: {reason}") from error
    return str(address)


def _card(repository: str) -> str:
    return (
        "---\nlibrary_name: timm\npipeline_tag: image-classification\ntags:\n- rlo\n---\n"
        f"# {repository.partition('/')[2] or repository}\n\n"
        "Trained with [rlo-timm](https://pypi.org/project/rlo-timm/); `run.json` has every option "
        "and `metrics.jsonl` each epoch.\n\n"
        f'```python\nimport timm\n\nmodel = timm.create_model("hf-hub:{repository}", '
        "pretrained=True)\n```\n"
    )
