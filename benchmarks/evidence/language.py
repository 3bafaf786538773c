"""Language evidence: training from scratch and finetuning, learning rate tuned per loss.

    python benchmarks/evidence/language.py benchmarks/evidence/configs/language-cpu.yaml

Perplexity is always exp of the mean cross entropy, whatever the loss was. A job names a model, a
text to train on and a text to remember; the learning rate is picked by perplexity on a validation
part, figures are of the test part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from lm_training import Parts, divide, load_model, measure, new_model, tokens_of, train
from rlo_core.errors import DataError
from rlo_core.files import atomic_path
from rlo_core.lm.text import load_text
from rlo_core.runs.record import Run
from runner import RESULTS, ROOT, Results, load_config
from safetensors.torch import save_file
from transformers import AutoTokenizer

MODELS = ROOT / "runs" / "evidence" / "models"


def resolve(path: str) -> str:
    """Return a path of the configuration: relative ones are relative to the repository."""
    found = (ROOT / path).resolve()
    if not found.exists():
        raise DataError(f"{path!r} is not there; see the configuration")
    return str(found)


class Job:
    """A model and its texts."""

    def __init__(
        self, name: str, config: dict[str, Any], models: Path, runs: Path | None = None
    ) -> None:
        self.name, self.config, self.models, self.runs = name, config, models, runs
        self.job: dict[str, Any] = config["jobs"][name]
        named = config["device"]
        if named == "auto":
            named = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(named)
        gguf = self.job.get("gguf_file")
        options = {"gguf_file": gguf} if gguf else {}
        self.tokenizer = AutoTokenizer.from_pretrained(resolve(self.job["tokenizer"]), **options)
        self.text = self.read(self.job["text"])
        self.other = self.read(self.job["remember"]) if "remember" in self.job else None

    def read(self, path: str) -> Parts:
        data = load_text(resolve(path), "train")
        return divide(tokens_of(data, self.tokenizer), self.config["held_out"])

    def model(self, seed: int) -> Any:
        torch.manual_seed(seed)
        if "folder" in self.job:
            return load_model(resolve(self.job["folder"]), self.device, self.job.get("gguf_file"))
        return new_model(self.job["kind"], self.job["options"]).to(self.device)

    def file(self, loss: str, lr: float, seed: int) -> Path:
        """Return where the weights of a run are kept."""
        spec = loss.replace(":", "-").replace("=", "")
        return self.models / f"{self.name}_{spec}_lr{lr:g}_seed{seed}.safetensors"

    def perplexities(self, model: Any) -> dict[str, float]:
        limit = self.job.get("eval_tokens", self.config["eval_tokens"])
        settings = {"context": self.job["context"], "limit": limit}
        found = {
            "train": measure(model, self.text.train, **settings),
            "validation": measure(model, self.text.validation, **settings),
            "test": measure(model, self.text.test, **settings),
        }
        if self.other is not None:
            found["other"] = measure(model, self.other.test, **settings)
        return found

    def run(self, loss: str, lr: float, seed: int, name: str) -> dict[str, Any]:
        job = self.job
        model = self.model(seed)
        options = {key: job[key] for key in ("steps", "batch", "context", "warmup", "weight_decay")}
        run = self.runs and Run.create(
            self.runs / name.replace("/", "_").replace(":", "-"),
            kind="evidence language",
            loss=loss,
            options={"job": self.name, "lr": lr, **options},
            seed=seed,
            data={"name": job["text"], "tokens": len(self.text.train)},
        )

        def log(step: int, objective: float) -> None:
            if run:
                run.log(step=step, split="train", objective=objective)

        text = self.text.train
        spent = train(model, text, loss=loss, lr=lr, seed=seed, log=log, **options)
        found = self.perplexities(model)
        with atomic_path(self.file(loss, lr, seed)) as temporary:
            # A tied output layer is the embedding: safetensors takes one of the two.
            tied = set(model.all_tied_weights_keys)
            state = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
            save_file(state, temporary)
        if run:
            run.finish(**{f"{split}_perplexity": value for split, value in found.items()})
        return {
            "job": self.name,
            "loss": loss,
            "lr": lr,
            "seed": seed,
            "perplexity": found,
            **spent,
        }


def tuned(
    job: Job, results: Results, loss: str, seeds: list[int], rates: list[float] | None = None
) -> float:
    """Measure the grid with the first seed, then the others at the best learning rate, returned.

    The grid is `rates`, or else the job's.
    """

    def at(lr: float, seed: int) -> dict[str, Any]:
        name = f"{job.name}/{loss}/lr={lr:g}/seed={seed}"
        return results.measure(name, lambda: job.run(loss, lr, seed, name))

    grid = [at(lr, seeds[0]) for lr in rates or job.job["lr"]]
    best = float(min(grid, key=lambda record: record["perplexity"]["validation"])["lr"])
    for seed in seeds[1:]:
        at(best, seed)
    return best


@click.command()
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "evidence_language.jsonl")
@click.option("--models", type=click.Path(path_type=Path), default=MODELS)
@click.option("--runs", type=click.Path(path_type=Path), help="Write run folders for `rlo report`.")
def main(config_file: Path, out: Path, models: Path, runs: Path | None) -> None:
    """Run what CONFIG_FILE lists and is not yet in the results."""
    torch.set_num_threads(1)
    config = load_config(config_file)
    results = Results(out, config)
    for group in config["groups"]:
        seeds = group.get("seeds", config["seeds"])
        job = Job(group["job"], config, models, runs)
        if "folder" in job.job:
            results.measure(
                f"{job.name}/before",
                lambda j=job: {
                    "job": j.name,
                    "loss": None,
                    "perplexity": j.perplexities(j.model(0)),
                },
            )
        for count in range(1, len(seeds) + 1):  # every loss with one seed, then with two, ...
            for loss in group["losses"]:
                tuned(job, results, loss, seeds[:count], group.get("lr"))


if __name__ == "__main__":
    main()
