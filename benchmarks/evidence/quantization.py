"""Quantization evidence: does a model finetuned with a rooted loss lose less when it is quantized?

    python benchmarks/evidence/quantization.py benchmarks/evidence/configs/quantization-cpu.yaml

One start, one text, one recipe, those of a job of the language evidence; each loss has the learning
rate that is best for it on a validation part. Each finetuned model goes through `rlo-gptq quantize`
with the same settings and the same calibration tokens, of the text that it was finetuned on, and is
measured as the packed checkpoint that comes out. What is compared is the degradation,
log(perplexity after) - log(perplexity before), in nats per token: a loss that merely finetunes
better or worse does not change it.
"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import rlo_gptq
import torch
from language import MODELS, Job, tuned
from lm_training import measure
from rlo_core.files import write_text
from rlo_gptq.cli.quantize import run_quantization
from rlo_gptq.options import Options
from rlo_gptq.settings import LayerSettings
from runner import RESULTS, Results, load_config
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar


class Claim:
    """The finetuned models of a job of the language evidence, and how they are quantized."""

    def __init__(self, config: dict[str, Any], job: Job) -> None:
        self.config, self.job = config, job

    def perplexity(self, model: PreTrainedModel) -> float:
        limit = self.config["eval_tokens"]
        return measure(model, self.job.text.test, context=self.job.job["context"], limit=limit)

    def load(self, loss: str, lr: float, seed: int) -> PreTrainedModel:
        model: PreTrainedModel = self.job.model(seed)
        model.load_state_dict(load_file(self.job.file(loss, lr, seed)), strict=False)
        model.tie_weights()
        return model.eval()

    def calibration(self, folder: Path) -> Path:
        """Write the beginning of what was trained on, and nothing else of the text, to a file."""
        tokens = self.job.text.train[: self.config["calibration_tokens"]]
        text = self.job.tokenizer.decode(tokens, skip_special_tokens=True)
        path = folder / "calibration.txt"
        write_text(path, text)
        return path

    def quantize(
        self, model: Path, text: Path, folder: Path, settings: LayerSettings, seed: int
    ) -> tuple[float, float]:
        """Return the perplexity of the packed checkpoint and the mean proxy loss of its layers."""
        options = Options(
            model=str(model),
            dataset=str(text),
            layer=settings,
            nsamples=self.config["calibration_sequences"],
            seqlen=self.job.job["context"],
            seed=seed,
        )
        device = self.job.device.type
        summary = run_quantization(options, folder, device=device, progress=False)
        packed = rlo_gptq.load(folder, dtype=torch.float32, device_map=device)
        assert summary is not None  # only other processes than the first have none
        return self.perplexity(packed), float(summary["mean_proxy"])


def settings_by_name(config: dict[str, Any]) -> dict[str, LayerSettings]:
    """Return every combination of bits, method and incoherence, by a readable name."""
    return {
        f"w{bits}/{method}/{incoherence}": LayerSettings(
            bits=bits, method=method, incoherence=incoherence, rescale=incoherence != "none"
        )
        for bits in config["bits"]
        for method in config["methods"]
        for incoherence in config["incoherence"]
    }


def quantize_all(
    claim: Claim, results: Results, loss: str, lr: float, seed: int, runs: Path | None
) -> None:
    """Quantize one model with every setting that is not yet in the results."""
    settings = settings_by_name(claim.config)
    keys = {name: f"quantize/{loss}/seed={seed}/{name}" for name in settings}
    if all(key in results.records for key in keys.values()):
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = claim.load(loss, lr, seed)
        before = claim.perplexity(model)
        model.save_pretrained(folder / "model")
        claim.job.tokenizer.save_pretrained(folder / "model")
        text = claim.calibration(folder)
        for name, chosen in settings.items():
            plain = keys[name].replace("/", "_").replace(":", "-")
            out = (folder if runs is None else runs) / plain

            def one(chosen: LayerSettings = chosen, out: Path = out) -> dict[str, Any]:
                after, proxy = claim.quantize(folder / "model", text, out, chosen, seed)
                return {
                    "stage": "quantize",
                    "loss": loss,
                    "lr": lr,
                    "seed": seed,
                    "bits": chosen.bits,
                    "method": chosen.method,
                    "incoherence": chosen.incoherence,
                    "before": before,
                    "after": after,
                    "degradation": math.log(after) - math.log(before),
                    "proxy": proxy,
                }

            results.measure(keys[name], one)


@click.command()
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=RESULTS / "evidence_quantization.jsonl"
)
@click.option(
    "--language-out",
    type=click.Path(path_type=Path),
    default=RESULTS / "evidence_language.jsonl",
    help="Results of the language evidence: finetuning is recorded, and found, there.",
)
@click.option("--models", type=click.Path(path_type=Path), default=MODELS)
@click.option("--runs", type=click.Path(path_type=Path), help="Keep the checkpoints there.")
def main(config_file: Path, out: Path, language_out: Path, models: Path, runs: Path | None) -> None:
    """Run what CONFIG_FILE lists and is not yet in the results."""
    torch.set_num_threads(1)
    disable_progress_bar()
    config = load_config(config_file)
    results = Results(out, config)
    language = load_config(config_file.parent / config["language"])
    finetuned = Results(language_out, language)
    job = Job(config["job"], language, models)
    for key, record in list(finetuned.records.items()):
        if "lr" not in record or job.file(record["loss"], record["lr"], record["seed"]).exists():
            continue
        if record["job"] == job.name and record["loss"] in config["losses"]:
            del finetuned.records[key]  # measured elsewhere: the weights are needed here
    claim = Claim(config, job)
    for count in range(1, len(config["seeds"]) + 1):
        for loss in config["losses"]:
            lr = tuned(job, finetuned, loss, config["seeds"][:count])
            quantize_all(claim, results, loss, lr, config["seeds"][count - 1], runs)


if __name__ == "__main__":
    main()
