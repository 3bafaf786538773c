"""Load a GPTQ export in auto-gptq 0.7.1 and compare its logits with those of our checkpoint.

    python scripts/verify_auto_gptq.py OURS EXPORTED

auto-gptq is archived and does not import beside transformers 5, so it gets its own environment
(`.venv-auto-gptq`, made once, with the versions in constraints/auto-gptq.txt). EXPORTED has to be
of version 1 (`rlo-gptq export` writes it for symmetric grids): auto-gptq ignores version 2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-auto-gptq"
CONSTRAINTS = ROOT / "constraints" / "auto-gptq.txt"
TOLERANCE = 1e-4

# Runs in the environment of auto-gptq: argv is EXPORTED, the tokens' file and the logits' file.
LOAD = """
import sys, torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import load_file, save_file
model = AutoGPTQForCausalLM.from_quantized(
    sys.argv[1], device="cpu", use_triton=False, use_safetensors=True, model_basename="model",
    inject_fused_attention=False, inject_fused_mlp=False, disable_exllama=True,
    disable_exllamav2=True, torch_dtype=torch.float32)
tokens = load_file(sys.argv[2])["tokens"]
with torch.no_grad():
    save_file({"logits": model.model(tokens).logits.float().contiguous()}, sys.argv[3])
"""


def environment() -> Path:
    """Return the interpreter of auto-gptq's environment, made if it is not there."""
    python = VENV / "bin" / "python"
    if (VENV / ".installed").is_file():
        return python
    uv = Path(sys.executable).with_name("uv")
    install = [
        str(uv),
        "pip",
        "install",
        "--quiet",
        "--python",
        str(python),
        "-c",
        str(CONSTRAINTS),
    ]
    names = ["torch", "transformers", "peft", "accelerate", "datasets", "sentencepiece", "rouge"]
    subprocess.run([str(uv), "venv", "--quiet", str(VENV)], check=True)
    subprocess.run([*install, *names, "gekko", "setuptools", "wheel"], check=True)
    # Without a CUDA toolkit its build must leave the kernels out; it needs torch at build time.
    built = {**os.environ, "BUILD_CUDA_EXT": "0"}
    package = ["--no-build-isolation", "--no-deps", "auto-gptq==0.7.1"]
    subprocess.run([*install, *package], check=True, env=built)
    (VENV / ".installed").touch()
    return python


def main() -> None:
    """Compare and print one JSON object; exit with 1 if the logits differ."""
    import torch
    from rlo_gptq import load
    from safetensors.torch import load_file, save_file

    if len(sys.argv) != 3:
        sys.exit(__doc__)
    ours, exported = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((exported / "config.json").read_text("utf-8"))["quantization_config"]
    if config.get("checkpoint_format") != "gptq":
        sys.exit(
            "EXPORTED must be of version 1 (checkpoint_format 'gptq'): auto-gptq ignores others"
        )
    model = load(ours, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, 64), generator=generator)
    with torch.no_grad():
        expected = model(tokens).logits
    with tempfile.TemporaryDirectory() as name:
        inputs, outputs = Path(name) / "in.safetensors", Path(name) / "out.safetensors"
        save_file({"tokens": tokens}, inputs)
        command = [str(environment()), "-c", LOAD, str(exported), str(inputs), str(outputs)]
        subprocess.run(command, check=True)
        found = load_file(outputs)["logits"]
    difference = float((found - expected).abs().max() / expected.abs().max())
    print(json.dumps({"peer": "auto-gptq", "version": "0.7.1", "difference": difference}))
    sys.exit(0 if difference <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
