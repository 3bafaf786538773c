"""Peak memory of tuning: the packed model, what is trained, one block, hidden states."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from rlo_gptq.demo import byte_tokenizer
from rlo_gptq.settings import LayerSettings

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)

LIBRARIES = 24 << 20
"""What the interpreter and its libraries allocate meanwhile: tokenizers, JSON, matrix kernels."""

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from rlo_gptq.settings import EndToEndSettings
from rlo_gptq.tuning import run
from rlo_gptq.tuning.run import Tuning, run_tuning

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(1)
run.write_report = lambda *args, **kwargs: None  # charts are no part of tuning
text, scratch, *folders = sys.argv[1:]
for packed, original in zip(folders[::2], folders[1::2]):
    settings = EndToEndSettings(steps=2, nsamples=16, seqlen=128, top_k=8, evaluations=1)
    tuning = Tuning(Path(packed), text, settings, original=original)
    source = tuning.source(torch.device("cpu"))
    plan = tuning.plan(source)
    source.close()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    run_tuning(tuning, Path(scratch, Path(original).name), progress=False)
    print(json.dumps({"peak": status("VmHWM") - before, "plan": plan}))
"""


def save_llama(folder: Path, blocks: int, width: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.mark.slow
def test_peak_memory_of_tuning_is_what_the_plan_says(text_file, quantize_to, tmp_path):
    """With so many blocks that the dense model alone would be above the bound."""
    layer = LayerSettings(bits=2, method="nearest", incoherence="hadamard", rescale=True)
    folders: list[str] = []
    for name, blocks, width in (("warm", 1, 64), ("model", 24, 512)):
        save_llama(tmp_path / name, blocks, width)
        packed = tmp_path / f"{name}-packed"
        quantize_to(tmp_path / name, text_file, packed, layer, nsamples=1, seqlen=16)
        folders += [str(packed), str(tmp_path / name)]
    # Memory that is given back leaves the process at once, so that its peak is what was in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(text_file), str(tmp_path / "out"), *folders],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ).stdout
    measured = json.loads(printed.splitlines()[-1])
    bound = measured["plan"]["peak_memory_bytes"]
    dense = 4 * 24 * (4 * 512 * 512 + 3 * 3 * 512 * 512)
    assert 0.5 * bound <= measured["peak"] <= bound + LIBRARIES, measured
    assert measured["peak"] < 0.8 * dense
