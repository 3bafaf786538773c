"""Peak memory of a quantization: one block, the activations, and what rounding its widest layer
takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from rlo_gptq.demo import byte_tokenizer

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)


def save_llama(folder: Path, blocks: int, width: int, inner: int) -> int:
    """Save a Llama without training; return the bytes of its weights."""
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from rlo_gptq.cli.quantize import run_quantization
from rlo_gptq.options import Options
from rlo_gptq.pipeline.plan import discover
from rlo_gptq.settings import LayerSettings
from rlo_gptq.models.source import ModelSource

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(1)
settings, text, scratch, *folders = sys.argv[1:]
layer = LayerSettings(**json.loads(settings))
for name in folders:
    options = Options(model=name, dataset=text, layer=layer, nsamples=4, seqlen=64)
    source = ModelSource(Path(name))
    plan = discover(source, options).summary
    source.close()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    run_quantization(options, Path(scratch, Path(name).name), progress=False)
    print(json.dumps({"peak": status("VmHWM") - before, "plan": plan}))
"""

LIBRARIES = 16 << 20
"""What the interpreter and its libraries allocate meanwhile: tokenizers, JSON, matrix kernels."""


def measure(folders: list[Path], text: Path, scratch: Path, settings: dict) -> list[dict]:
    """Quantize models one after the other in a new process; return the peak and the plan of each.

    The peak is what was allocated beyond what the process had before.
    """
    arguments = [json.dumps(settings), str(text), str(scratch), *map(str, folders)]
    # Memory that is given back leaves the process at once, so that its peak is what was in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ).stdout
    return [json.loads(line) for line in printed.splitlines()[-len(folders) :]]


@pytest.mark.parametrize(
    ("settings", "squares", "inner"),
    [
        pytest.param({"bits": 4, "method": "gptq"}, 3, 2048, id="gptq"),
        pytest.param(
            {"bits": 4, "method": "gptq", "group_size": 128, "sym": False},
            3,
            2048,
            id="groups",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"bits": 2, "npasses": 2, "incoherence": "hadamard", "rescale": True},
            3,
            2048,
            id="incoherence",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"bits": 2, "method": "ldlbal_admm", "npasses": 1},
            8,
            1280,
            id="ldlbal_admm",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_peak_memory_is_one_block_the_activations_and_three_hessians(
    settings, squares, inner, text_file, tmp_path
):
    """Three matrices (d, d), eight for ldlbal_admm, and six (d, outputs), as the plan says."""
    save_llama(tmp_path / "warm", 1, 64, 128)
    save_llama(tmp_path / "model", 1, 256, inner)
    folders = [tmp_path / "warm", tmp_path / "model"]
    _, measured = measure(folders, text_file, tmp_path / "out", settings)
    plan, square = measured["plan"], 4 * inner * inner
    bound = plan["block_bytes"] + plan["activation_bytes"] + squares * square + 6 * 4 * inner * 256
    assert plan["largest_hessian_bytes"] == square
    assert plan["peak_memory_bytes"] == bound
    assert 0.75 * bound <= measured["peak"] <= bound + LIBRARIES


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_blocks(text_file, tmp_path):
    """One block is in memory at a time: six times the blocks cost a fraction of their bytes."""
    settings = {"bits": 2, "method": "nearest", "incoherence": "hadamard"}
    folders = [tmp_path / name for name in ("warm", "few", "many")]
    save_llama(folders[0], 1, 64, 128)
    smaller = save_llama(folders[1], 4, 256, 1024)
    larger = save_llama(folders[2], 24, 256, 1024)
    _, few, many = measure(folders, text_file, tmp_path / "out", settings)
    assert many["peak"] - few["peak"] < 0.1 * (larger - smaller)
