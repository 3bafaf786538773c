"""Quantization evidence: does a model finetuned with a rooted loss lose less when it is quantized?

    python benchmarks/evidence/quantization.py benchmarks/evidence/configs/quantization-cpu.yaml

One start, one text, one recipe, those of a job of the language evidence; each loss has the learning
rate that is best for it on a validation part. Each finetuned model is quantized with the same
settings and the same calibration tokens. What is compared is the degradation, log(perplexity after)
- log(perplexity before), in nats per token: a loss that merely finetunes better or worse does not
change it.

Layers are rounded one by one against the Hessians of the unquantized model.
"""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import click
import torch
from language import MODELS, Job, tuned
from lm_training import measure
from rlo_gptq.hessian import HessianSum
from rlo_gptq.layer import quantize_layer
from rlo_gptq.settings import LayerSettings
from runner import RESULTS, Results, load_config
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers of the decoder blocks by name: what quantizers round."""
    head = model.get_output_embeddings()
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and m is not head}


@torch.no_grad()
def hessians(model: PreTrainedModel, sequences: Tensor) -> dict[str, Tensor]:
    """Return the second moment of each layer's inputs over the calibration sequences."""
    sums = {name: HessianSum(m.in_features, model.device) for name, m in linears(model).items()}
    handles = [
        m.register_forward_pre_hook(lambda _, args, s=sums[name]: s.add(args[0]))
        for name, m in linears(model).items()
    ]
    for part in sequences.split(8):
        model(part.to(model.device))
    for handle in handles:
        handle.remove()
    return {name: total.mean(name) for name, total in sums.items()}


@torch.no_grad()
def quantized(
    model: PreTrainedModel, moments: dict[str, Tensor], settings: LayerSettings, seed: int
) -> tuple[PreTrainedModel, float]:
    """Return a copy whose linear layers have quantized values, and the mean proxy loss."""
    copy = deepcopy(model)
    proxies = []
    for name, module in linears(copy).items():
        layer = quantize_layer(module.weight, moments[name], settings, seed=seed)
        module.weight.copy_(layer.dequantize().to(module.weight))
        proxies.append(layer.proxy)
    return copy, sum(proxies) / len(proxies)


class Claim:
    """The finetuned models of a job of the language evidence, and the calibration tokens."""

    def __init__(self, config: dict[str, Any], job: Job) -> None:
        self.config, self.job = config, job
        # Fixed, so that every model sees the same calibration tokens.
        generator = torch.Generator().manual_seed(config["calibration_seed"])
        count, context = config["calibration_sequences"], job.job["context"]
        train = job.text.train
        at = torch.randint(0, len(train) - context, (count,), generator=generator)
        self.calibration = train[at[:, None] + torch.arange(context)]

    def perplexity(self, model: PreTrainedModel) -> float:
        limit = self.config["eval_tokens"]
        return measure(model, self.job.text.test, context=self.job.job["context"], limit=limit)

    def load(self, loss: str | None, lr: float, seed: int) -> PreTrainedModel:
        model: PreTrainedModel = self.job.model(seed)
        if loss is not None:
            model.load_state_dict(load_file(self.job.file(loss, lr, seed)), strict=False)
            model.tie_weights()
        return model.eval()


def settings_of(config: dict[str, Any]) -> dict[str, LayerSettings]:
    """Return every combination of bits, method and incoherence, by a readable name."""
    return {
        f"w{bits}/{method}/{incoherence}": LayerSettings(
            bits=bits, method=method, incoherence=incoherence, rescale=incoherence != "none"
        )
        for bits in config["bits"]
        for method in config["methods"]
        for incoherence in config["incoherence"]
    }


def quantize_all(claim: Claim, results: Results, loss: str | None, lr: float, seed: int) -> None:
    """Quantize one model with every setting that is not yet in the results."""
    settings = settings_of(claim.config)
    keys = {name: f"quantize/{loss or 'start'}/seed={seed}/{name}" for name in settings}
    if all(key in results.records for key in keys.values()):
        return
    model = claim.load(loss, lr, seed)
    before = claim.perplexity(model)
    moments = hessians(model, claim.calibration)
    for name, chosen in settings.items():

        def one(chosen: LayerSettings = chosen) -> dict[str, Any]:
            copy, proxy = quantized(model, moments, chosen, seed)
            after = claim.perplexity(copy)
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
def main(config_file: Path, out: Path, language_out: Path, models: Path) -> None:
    """Run what CONFIG_FILE lists and is not yet in the results."""
    torch.set_num_threads(1)
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
    quantize_all(claim, results, None, 0.0, config["seeds"][0])
    for count in range(1, len(config["seeds"]) + 1):
        for loss in config["losses"]:
            lr = tuned(job, finetuned, loss, config["seeds"][:count])
            quantize_all(claim, results, loss, lr, config["seeds"][count - 1])


if __name__ == "__main__":
    main()
