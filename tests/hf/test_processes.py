"""Two processes have the gradient and the evaluation of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "mode"),
    [("llama", "ddp"), ("llama", "fused"), ("gpt2", "ddp"), ("t5", "ddp"), ("llama", "fsdp2")],
)
def test_two_processes_have_the_gradient_and_evaluation_of_one(tmp_path, hf, name, mode):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "gradient.pt"
    worker = Path(__file__).with_name("worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={port}", str(worker), name, mode, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    got = torch.load(out, weights_only=True)
    assert hf.relative_error(got, hf.expected_gradient(name, hf.examples(name), 5.0)) < 3e-6
    metrics = json.loads(out.with_suffix(".json").read_text())
    model = hf.build(name).eval()
    batch = hf.collate(hf.examples(name, 7, seed=3))
    logits, labels = hf.scores_and_labels(model, name, batch)
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert metrics["eval_ce"] == pytest.approx(ce, rel=1e-5)
    objective = hf.rooted_mean([(logits, labels)], 5.0).item()
    assert metrics["eval_loss"] == pytest.approx(objective, rel=1e-5)
