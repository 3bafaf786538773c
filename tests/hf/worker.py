"""One process of two: an update and an evaluation, saved by the first. Run by test_processes.py."""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed


def main(name: str, mode: str, out: str) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    from rlo_hf import Trainer

    more = {}
    if mode == "fsdp2":
        wrap = "T5Block" if name == "t5" else "LlamaDecoderLayer"
        more = {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [wrap]},
        }
    grab = Grab()
    with tempfile.TemporaryDirectory() as folder:
        args = tiny.arguments(
            Path(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=2,
            learning_rate=0.0,
            **more,
        )
        trainer = Trainer(
            tiny.build(name),
            args,
            tiny.collate,
            tiny.examples(name),
            tiny.examples(name, 7, seed=3),
            loss="rlo:k=5",
            linear="fused" if mode == "fused" else "off",
            callbacks=[grab],
        )
        trainer.train()
        metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        torch.save(grab.value, out)
        Path(out).with_suffix(".json").write_text(json.dumps(metrics))
    torch.distributed.destroy_process_group()


def full(gradient: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded gradient."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


if __name__ == "__main__":
    import transformers

    class Grab(transformers.TrainerCallback):
        value = None

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.value = torch.cat(
                [full(p.grad).flatten().clone() for p in kwargs["model"].parameters()]
            )

    main(*sys.argv[1:])
