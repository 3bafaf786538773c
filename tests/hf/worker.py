"""One process of two: an update and an evaluation, saved by the first. Run by test_processes.py.

Modes: "ddp", "fused", "token-weights" (a column of weights), "local" (labels are averaged within
each process), "fsdp2" and "fsdp2-logits" (by the Trainer's arguments), "accelerate" (FSDP2 by the
configuration of `accelerate launch`), "zero1" to "zero3", "weights" (as "ddp", with class weights).
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed
import transformers

RATE = 0.5
FUSED = ("fused", "fsdp2", "accelerate", "token-weights")


class Grab(transformers.TrainerCallback):
    """Keeps the gradient of the first update."""

    value = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if kwargs["model"].__class__.__name__ == "DeepSpeedEngine":
            return
        gradients = [p.grad for p in kwargs["model"].parameters()]
        if all(g is not None for g in gradients):
            self.value = torch.cat([whole(g).flatten().clone() for g in gradients])


def whole(gradient):
    """The whole of a sharded gradient."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def options_of(mode, name):
    """What the Trainer's arguments have beside the common ones."""
    if mode == "local":
        return {"average_tokens_across_devices": False}
    if mode.startswith("fsdp2"):
        wrap = "T5Block" if name == "t5" else "LlamaDecoderLayer"
        config = {"version": 2, "transformer_layer_cls_to_wrap": [wrap]}
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
    if mode.startswith("zero"):
        config = {
            "zero_optimization": {"stage": int(mode[4:])},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
        }
        _let_deepspeed_onto_cpus()
        return {
            "deepspeed": config,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "use_cpu": False,
        }
    return {}


def _let_deepspeed_onto_cpus():
    """accelerate has a backend for several CPU processes, or DeepSpeed, but not both."""
    from accelerate.state import DistributedType, PartialState

    def backend(self, cpu=False, sagemaker_dp=False, backend=None):
        return "gloo", DistributedType.MULTI_CPU

    PartialState._prepare_backend = backend


def weights(model, mode):
    """All weights as one vector."""
    if mode != "zero3":
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    import deepspeed

    parts = []
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            parts.append(parameter.detach().flatten().clone())
    return torch.cat(parts)


def loss_of(mode, model):
    """The loss: the rooted one, in mode "weights" with a weight for each class."""
    if mode != "weights":
        return "rlo:k=5"
    from rlo_core.modules import RootedLoss

    return RootedLoss(k=5, weight=torch.linspace(0.2, 3.0, model.config.vocab_size))


def main(name: str, mode: str, out: str) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    from rlo_hf import Trainer

    grab = Grab()
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 0.0,
        }
        args = tiny.arguments(Path(folder), **{**common, **options_of(mode, name)})
        model = tiny.build(name)
        before = weights(model, "")
        rows = tiny.examples(name)
        if mode == "token-weights":
            for i, row in enumerate(rows):
                row["loss_weight"] = torch.linspace(-0.3, 1.0 + i, len(row["labels"])).tolist()
        trainer = Trainer(
            model,
            args,
            tiny.collate,
            rows,
            tiny.examples(name, 7, seed=3),
            loss=loss_of(mode, model),
            linear="fused" if mode in FUSED else "off",
            callbacks=[grab],
        )
        metrics = None
        if mode.startswith("zero"):  # its gradients are in buffers of its own: the step shows them
            trainer.train()
            grab.value = (before - weights(model, mode)) / RATE
        else:
            trainer.train()
            metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        torch.save(grab.value, out)
        Path(out).with_suffix(".json").write_text(json.dumps(metrics))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
