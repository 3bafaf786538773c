"""Prove a GGUF file in llama.cpp itself: it loads, computes what we compute, and generates.

    python scripts/verify_gguf.py FILE.gguf
    python scripts/verify_gguf.py FILE.gguf --model MODEL --dataset TEXT

llama.cpp gets an environment of its own (`.venv-llama-cpp`, made once from PyPI's prebuilt
`xllamacpp`). Checked are: the tokens of a sentence; the logits of the file's weights, dequantised
by llama.cpp's own functions, against those that transformers computes from the file (equal to
rounding in half precision); that it generates. llama.cpp multiplies quantized weights by
activations rounded to 8 bits: how far that moves the logits is shown, and is no fault of the file.

With --model and --dataset, llama.cpp's own quantizer makes a file of the same types, so of the same
bytes, with an importance matrix from the same calibration text, and both perplexities are measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-llama-cpp"
# The declarations of the second are those of the library in the first: the same llama.cpp.
PACKAGES = ("xllamacpp==2026.10.11549", "llama-cpp-py-sync==0.11548", "gguf>=0.19", "numpy")
TOLERANCE = 1e-3
SENTENCE = "Once upon a time, there was a little dog named Max. It cost 12 dollars!"


def environment(folder: Path = VENV) -> Path:
    """Return the interpreter of llama.cpp's environment, made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / ".installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--only-binary=:all:"]
        subprocess.run([*install, *PACKAGES], check=True)
        (folder / ".installed").touch()
    return python


def in_llama_cpp(python: Path, **task: Any) -> Any:
    """Run one task of `gguf_in_llama_cpp.py`; paths are made strings."""
    plain = {key: str(v) if isinstance(v, Path) else v for key, v in task.items()}
    done = subprocess.run(
        [str(python), str(ROOT / "scripts" / "gguf_in_llama_cpp.py")],
        input=json.dumps(plain),
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        raise SystemExit(f"llama.cpp: {task['task']} failed: {done.stderr.strip()[-600:]}")
    return json.loads(found[-1].removeprefix("RESULT "))


def check_file(python: Path, path: Path) -> dict[str, Any]:
    """Compare tokens and logits, and generate."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = [int(token) for token in tokenizer(SENTENCE)["input_ids"]]
    with torch.no_grad():
        ours = model(torch.tensor([tokens])).logits[0].numpy()
    with tempfile.TemporaryDirectory() as scratch:
        dense, out = Path(scratch) / "dense.gguf", Path(scratch) / "logits.npy"
        in_llama_cpp(python, task="dequantize", source=path, out=dense)
        answers: dict[str, Any] = {}
        differences = {}
        for name, file in (("weights", dense), ("file", path)):
            answers = in_llama_cpp(
                python, task="logits", path=file, tokens=tokens, out=out, text=SENTENCE
            )
            difference = np.abs(np.load(out) - ours).max() / np.abs(ours).max()
            differences[name] = float(difference)
    generated = in_llama_cpp(python, task="generate", path=path, prompt=SENTENCE, count=16)
    return {
        "tokens_equal": answers["tokens"] == tokens,
        "logits_difference": differences["weights"],
        "with_8_bit_activations": differences["file"],
        "generated": generated["text"],
    }


def importance(source: Any, sequences: Any, path: Path) -> None:
    """Write the mean square of every matrix's inputs over the calibration text: an imatrix."""
    import numpy as np
    import torch
    from rlo_gptq.formats.gguf.architecture import architecture_of, tensor_name

    source.load(lambda name: True)
    model = source.model
    model.tie_weights()
    architecture = architecture_of(source.config.to_dict())
    sums: dict[str, Any] = {}

    def add(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.square().sum(0)

        return hook

    hooks = [
        module.register_forward_pre_hook(add(tensor_name(architecture, f"{name}.weight")))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    with torch.no_grad():
        for row in sequences:
            model(row[None])
    for hook in hooks:
        hook.remove()
    count = sequences.numel()
    np.savez(path, **{name: (total / count).float().numpy() for name, total in sums.items()})


def peer_file(
    python: Path, path: Path, model: str, sequences: Any, folder: Path, *, name: str = "peer"
) -> Path:
    """Make the file that llama.cpp's own quantizer makes, of the types of `path`."""
    from rlo_gptq.formats.gguf.finish import write_dense
    from rlo_gptq.models.source import ModelSource, find_model

    dense, matrix = folder / "dense.gguf", folder / "imatrix.npz"
    if not matrix.is_file():
        source = ModelSource(find_model(model))
        write_dense(source, dense, kind="F32", base=model)
        importance(source, sequences, matrix)
    out = folder / f"{name}.gguf"
    in_llama_cpp(python, task="quantize", source=dense, like=path, out=out, imatrix=matrix)
    return out


def windows_of(
    model: str, dataset: str, split: str | None, context: int, count: int
) -> list[list[int]]:
    """Return windows of tokens of the evaluation text."""
    from rlo_core.lm.text import load_first_split
    from rlo_core.lm.tokens import token_ids
    from rlo_gptq.models.source import find_model
    from transformers import AutoTokenizer

    data, _ = load_first_split(dataset, [split] if split else ["test", "validation", "train"])
    ids = token_ids(AutoTokenizer.from_pretrained(find_model(model)), data)
    ids = ids[: count * context]
    return [ids[i : i + context].tolist() for i in range(0, len(ids) - context + 1, context)]


def calibration(model: str, dataset: str, split: str | None, nsamples: int, seqlen: int) -> Any:
    """Return the calibration sequences that `rlo-gptq quantize` draws with the same options."""
    from rlo_gptq.models.source import ModelSource, find_model
    from rlo_gptq.options import Options
    from rlo_gptq.pipeline.blocks import load_calibration
    from rlo_gptq.settings import LayerSettings

    options = Options(
        model=model,
        dataset=dataset,
        layer=LayerSettings(),
        nsamples=nsamples,
        seqlen=seqlen,
        split=split,
    )
    return load_calibration(options, ModelSource(find_model(model)), seqlen)[0]


def main() -> None:
    """Check, print one JSON object, and exit with 1 if anything does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", help="the dense model, to compare with llama.cpp's quantizer")
    parser.add_argument("--dataset", help="the calibration text; its test split is measured")
    parser.add_argument("--split", help="of the calibration text")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    args = parser.parse_args()
    python = environment()
    found = {"file": str(args.file), **check_file(python, args.file)}
    good = found["tokens_equal"] and found["logits_difference"] < TOLERANCE
    if args.model and args.dataset:
        sequences = calibration(args.model, args.dataset, args.split, args.nsamples, args.seqlen)
        windows = windows_of(args.model, args.dataset, None, args.context, args.windows)
        with tempfile.TemporaryDirectory() as scratch:
            peer = peer_file(python, args.file, args.model, sequences, Path(scratch))
            found["bytes"], found["peer_bytes"] = args.file.stat().st_size, peer.stat().st_size
            for name, path in (("perplexity", args.file), ("peer_perplexity", peer)):
                measured = in_llama_cpp(python, task="perplexity", path=path, windows=windows)
                found[name] = measured["perplexity"]
        good = good and found["perplexity"] < found["peer_perplexity"]
    print(json.dumps({**found, "holds": bool(good)}, indent=2))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
