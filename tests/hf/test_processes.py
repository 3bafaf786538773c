"""Two processes have the gradient and the evaluation of one."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rlo_core.functional import rooted_loss

pytestmark = pytest.mark.slow

FSDP2 = """compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
machine_rank: 0
num_machines: 1
num_processes: 2
use_cpu: true
"""


def two_processes(tmp_path, name, mode):
    """Return the gradient of the first update, and the metrics of an evaluation."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "gradient.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if mode == "accelerate":
        (tmp_path / "fsdp2.yaml").write_text(FSDP2)
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += [f"--config_file={tmp_path / 'fsdp2.yaml'}", f"--main_process_port={port}"]
    if mode.startswith("zero"):
        del environment["ACCELERATE_USE_CPU"]  # accelerate would leave DeepSpeed out
        environment["DS_ACCELERATOR"] = "cpu"
    command += [str(Path(__file__).with_name("worker.py")), name, mode, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads(out.with_suffix(".json").read_text())
    return torch.load(out, weights_only=True), metrics


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llama", "ddp"),
        ("llama", "fused"),
        ("gpt2", "ddp"),
        ("t5", "ddp"),
        ("llama", "fsdp2"),
        ("llama", "fsdp2-logits"),
        ("llama", "accelerate"),
    ],
)
def test_two_processes_have_the_gradient_and_evaluation_of_one(tmp_path, hf, name, mode):
    got, metrics = two_processes(tmp_path, name, mode)
    assert hf.relative_error(got, hf.expected_gradient(name, hf.examples(name), 5.0)) < 3e-6
    model = hf.build(name).eval()
    batch = hf.collate(hf.examples(name, 7, seed=3))
    logits, labels = hf.scores_and_labels(model, name, batch)
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert metrics["eval_ce"] == pytest.approx(ce, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(ce), rel=1e-5)
    objective = hf.rooted_mean([(logits, labels)], 5.0).item()
    assert metrics["eval_loss"] == pytest.approx(objective, rel=1e-5)


def test_class_weights_divide_by_their_sum_over_both_processes(tmp_path, hf):
    got, _ = two_processes(tmp_path, "llama", "weights")
    model = hf.build("llama").train()
    logits, labels = hf.scores_and_labels(model, "llama", hf.collate(hf.examples("llama")))
    weight = torch.linspace(0.2, 3.0, logits.shape[-1])
    rooted_loss(logits.flatten(0, 1), labels.flatten(), k=5, weight=weight).backward()
    assert hf.relative_error(got, hf.gradients(model)) < 3e-6


def test_weights_of_tokens_are_summed_over_both_processes(tmp_path, hf):
    """The mean divides by the sum of all weights, of which the two have different shares."""
    got, _ = two_processes(tmp_path, "llama", "token-weights")
    rows = hf.examples("llama")
    model = hf.build("llama").train()
    logits, labels = hf.scores_and_labels(model, "llama", hf.collate(rows))
    spread = [torch.linspace(-0.3, 1.0 + i, len(row["labels"])) for i, row in enumerate(rows)]
    weight = torch.nn.utils.rnn.pad_sequence(spread, batch_first=True)[:, 1:]
    kept = labels != -100
    log_p = logits[kept].log_softmax(-1).gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1)
    ((weight[kept] * 5 * (1 - (log_p / 5).exp())).sum() / weight[kept].sum()).backward()
    assert hf.relative_error(got, hf.gradients(model)) < 3e-6


def test_without_averaging_over_devices_each_process_divides_by_its_own_labels(tmp_path, hf):
    """`average_tokens_across_devices=False`: the mean of two means, as transformers has it."""
    rows = hf.examples("llama")
    got, _ = two_processes(tmp_path, "llama", "local")
    # Batches of two rows go to the processes in turn.
    mine = [hf.expected_gradient("llama", [*rows[i : i + 2], *rows[i + 4 : i + 6]], 5.0)
            for i in (0, 2)]  # fmt: skip
    assert hf.relative_error(got, (mine[0] + mine[1]) / 2) < 3e-6
    assert hf.relative_error(got, hf.expected_gradient("llama", rows, 5.0)) > 1e-3


@pytest.mark.parametrize("mode", ["zero1", "zero2", "zero3"])
def test_deepspeed_takes_the_step_of_the_formula(tmp_path, hf, mode):
    pytest.importorskip("deepspeed")
    got, _ = two_processes(tmp_path, "llama", mode)
    expected = hf.expected_gradient("llama", hf.examples("llama"), 5.0)
    assert hf.relative_error(got, expected) < 1e-5
