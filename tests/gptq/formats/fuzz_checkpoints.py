"""Damage checkpoints in every way we could think of, and say what reading them did.

    python fuzz_checkpoints.py load|from_pretrained|import FOLDER SCRATCH FIRST LAST

A program of its own: memory is limited by the system and time by an alarm, and a crash is seen. For
each seed in FIRST..LAST-1 it prints a JSON line: kind, what was damaged, outcome, message.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GIBIBYTE = 1 << 30
SECONDS = 30
ABSURD: list[Any] = [-2, -(2**63), 10**9, 10**12, 2**70, 1e308, 1.5, "x", None, True, [], {}, 0]


class TooSlowError(BaseException):
    """The alarm rang."""


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded


def truncate_file(folder: Path, rng: random.Random) -> str:
    names = ["model.safetensors", "model.safetensors", "config.json"]
    path = folder / rng.choice(names)
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data))])])
    return path.name


def flip_header_bytes(folder: Path, rng: random.Random) -> str:
    data = bytearray(weights(folder).read_bytes())
    size = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice([1, 1, 4, 32])):
        data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    weights(folder).write_bytes(data)
    return "header"


def flip_data_bytes(folder: Path, rng: random.Random) -> str:
    data = bytearray(weights(folder).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice([1, 4, 64])):
        data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    weights(folder).write_bytes(data)
    return "data"


def edit_header(folder: Path, rng: random.Random) -> str:
    data = weights(folder).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = rng.choice(sorted(key for key in header if key != "__metadata__"))
    entry = header[name]
    change = rng.randrange(8)
    if change == 0:
        entry["shape"] = [2 ** rng.choice([31, 40, 62]), 2 ** rng.choice([0, 1, 31])]
    elif change == 1:
        entry["shape"] = rng.choice([[-1, 4], [1.5], "shape", [], [0], None, [[1]]])
    elif change == 2:
        entry["dtype"] = rng.choice(["F64", "I8", "BOOL", "U16", "F8_E4M3", "X", 7, None, "BF16"])
    elif change == 3:
        entry["data_offsets"] = rng.choice([[0, 2**62], [-8, 8], [8, 0], [0], "x", [0, 0]])
    elif change == 4:
        del header[name]
    elif change == 5:
        header["__metadata__"] = rng.choice([{"a": 1}, [], "x", {"format": "pickle"}, None])
    elif change == 6:
        header[rng.choice(["../../x", "\x00", "", "a" * 100_000])] = entry
    else:
        header[name + "x"] = header.pop(name)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:  # the same name twice
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
    length = rng.choice([len(text)] * 12 + [2**63 - 1, 2**31, 10**8 + 1])
    weights(folder).write_bytes(struct.pack("<Q", length) + text + data[8 + size :])
    return name


def edit_tensor(folder: Path, rng: random.Random) -> str:
    tensors = load_file(weights(folder))
    grid = [name for name in tensors if name.rpartition(".")[2] not in ("weight", "qweight")]
    name = rng.choice(sorted(tensors) if rng.random() < 0.5 or not grid else sorted(grid))
    old = tensors[name]
    change = rng.randrange(9)
    if change == 0 and old.is_floating_point():
        flat = old.clone().reshape(-1)
        flat[rng.randrange(flat.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
        tensors[name] = flat.view(old.shape)
    elif change == 1:
        tensors[name] = torch.zeros(*old.shape, 1, dtype=old.dtype)
    elif change == 2:
        tensors[name] = old[: max(0, len(old) - 1)].contiguous()
    elif change == 3:
        tensors[name] = torch.cat([old, old])
    elif change == 4:
        kinds = [torch.float64, torch.int8, torch.bool, torch.uint8, torch.int64, torch.float16]
        tensors[name] = old.to(rng.choice(kinds))
    elif change == 5:
        del tensors[name]
    elif change == 6:
        if old.is_floating_point():
            tensors[name] = (old.float() * rng.choice([1e30, -1.0, 0.0, 1e38])).to(old.dtype)
        else:
            tensors[name] = torch.randint_like(old, -(2**31), 2**31 - 1)
    elif change == 7:
        tensors[name] = torch.zeros(0, dtype=old.dtype)
    else:
        tensors["model.layers.999." + name.rpartition("layers.0.")[2]] = old.clone()
    save_file(tensors, weights(folder), metadata={"format": "pt"})
    return name


def edit_quantization(folder: Path, rng: random.Random) -> str:
    config = read_config(folder)
    section: Any = config["quantization_config"]
    if "settings" in section and rng.random() < 0.7:
        section = section["settings"]
    name = rng.choice(sorted(section))
    change = rng.randrange(10)
    if change < 7:
        section[name] = rng.choice([*ABSURD, 3, 8, 64, 128, "kronecker", "trellis", "both", "quip"])
    elif change == 7:
        del section[name]
    elif change == 8:
        section["unknown"] = 1
    else:
        config["quantization_config"] = rng.choice([None, [], "x", {}, {"quant_method": "gptq"}])
    (folder / "config.json").write_text(json.dumps(config))
    return name


def edit_modules(folder: Path, rng: random.Random) -> str:
    config = read_config(folder)
    section = config["quantization_config"]
    change = rng.randrange(4)
    if "modules" not in section or change == 0:
        section["blocks"] = rng.choice(
            ["", ".", "model", "model.layers.0", "__class__", "a" * 9999]
        )
    elif change == 1:
        name = rng.choice(["", "..", "mlp", "input_layernorm", "self_attn.__init__", "x.y"])
        section["modules"][name] = rng.choice([None, [0], [10**9], [-1], [0, 0]])
    elif change == 2:
        name = rng.choice(sorted(section["modules"]))
        section["modules"][name] = rng.choice([[5], [True], ["0"], [0.0], 3, "0", {}, [[0]]])
    else:
        del section["modules"][rng.choice(sorted(section["modules"]))]
    (folder / "config.json").write_text(json.dumps(config))
    return "quantization_config"


def edit_model_config(folder: Path, rng: random.Random) -> str:
    config = read_config(folder)
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "vocab_size", "head_dim", "model_type", "architectures"]
    names += ["hidden_act", "rope_parameters", "dtype", "tie_word_embeddings", "auto_map"]
    names += ["max_position_embeddings", "rms_norm_eps", "attention_bias"]
    name = rng.choice(names)
    config[name] = rng.choice([*ABSURD, 10**7, "llama", {"AutoModelForCausalLM": "evil.Model"}])
    (folder / "config.json").write_text(json.dumps(config))
    return name


def break_json(folder: Path, rng: random.Random) -> str:
    name = rng.choice(["config.json", "model.safetensors.index.json"])
    depth = 200_000
    texts = [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"{'a': 1}", b"[" * depth + b"]" * depth]
    texts += [b'{"a":' * depth + b"1" + b"}" * depth, b'{"weight_map": ' + b"9" * 10_000 + b"}"]
    texts += [
        b'{"a": NaN}',
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 1}}',
    ]
    (folder / name).write_bytes(rng.choice(texts))
    return name


def edit_index(folder: Path, rng: random.Random) -> str:
    tensors = sorted(load_file(weights(folder)))
    named = dict.fromkeys(tensors, "model.safetensors")
    outside = folder.parent / "outside.safetensors"
    shutil.copyfile(weights(folder), outside)
    change = rng.randrange(7)
    target = rng.choice(tensors)
    if change == 0:
        named[target] = rng.choice(["../outside.safetensors", str(outside), "./model.safetensors"])
    elif change == 1:
        named[target] = rng.choice(
            ["/etc/passwd", "/dev/zero", "..", "", "\x00", "a\nb", "config.json"]
        )
    elif change == 2:
        named[target] = rng.choice(["missing.safetensors", "x" * 5000])
    elif change == 3:
        named[target] = rng.choice([None, 3, [], {}])  # type: ignore[assignment]
    elif change == 4:  # the same tensors in two files
        shutil.copyfile(weights(folder), folder / "second.safetensors")
        named[target] = "second.safetensors"
    elif change == 5:
        (folder / "link.safetensors").symlink_to(
            rng.choice(["/dev/zero", "/dev/urandom", "link.safetensors"])
        )
        named[target] = "link.safetensors"
    else:
        named = dict.fromkeys(rng.sample(tensors, 2), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    return target


def replace_file(folder: Path, rng: random.Random) -> str:
    path = weights(folder)
    change = rng.randrange(4)
    path.unlink()
    if change == 0:
        path.symlink_to(rng.choice(["/dev/zero", "/etc/passwd", "model.safetensors"]))
    elif change == 1:
        path.mkdir()
    elif change == 2:
        path.write_bytes(rng.randbytes(4096))
    return path.name


MUTATIONS: list[Callable[[Path, random.Random], str]] = [
    truncate_file,
    flip_header_bytes,
    flip_data_bytes,
    flip_data_bytes,
    edit_header,
    edit_header,
    edit_tensor,
    edit_tensor,
    edit_tensor,
    edit_quantization,
    edit_quantization,
    edit_modules,
    edit_model_config,
    break_json,
    edit_index,
    replace_file,
]


def check_loaded(model: Any, folder: Path) -> None:
    """Refuse a model whose weights are not finite, or not those of the files."""
    from rlo_gptq.checkpoint.validation import weight_paths
    from rlo_gptq.packed.quant_linear import QuantLinear

    stored: dict[str, torch.Tensor] = {}
    for file in weight_paths(folder):
        stored.update(load_file(file))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AssertionError(f"{name} is not finite")
        if name in stored and not torch.equal(tensor, stored[name].to(tensor.dtype)):
            raise AssertionError(f"{name} is not what the file has")
        if name not in stored and name not in model.all_tied_weights_keys:
            raise AssertionError(f"{name} came from nowhere")
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    for module in packed:
        if not bool(torch.isfinite(module.dequantize()).all()):
            raise AssertionError("a dequantised weight is not finite")


def read(how: str, folder: Path) -> None:
    import rlo_gptq

    if how == "load":
        check_loaded(rlo_gptq.load(folder), folder)
    elif how == "from_pretrained":
        from transformers import AutoModelForCausalLM

        check_loaded(AutoModelForCausalLM.from_pretrained(folder), folder)
    else:
        from rlo_gptq.formats.import_gptq import import_checkpoint

        out = import_checkpoint(folder, folder.parent / "imported").folder
        check_loaded(rlo_gptq.load(out), out)


def main() -> None:
    how, source, scratch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    import transformers
    from rlo_core.errors import RLOError

    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    read(how, copy(source, scratch))  # what is imported late is imported now
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + GIBIBYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def ring(*_: object) -> None:
        raise TooSlowError

    signal.signal(signal.SIGALRM, ring)
    for seed in range(int(sys.argv[4]), int(sys.argv[5])):
        rng = random.Random(seed)
        mutate = MUTATIONS[seed % len(MUTATIONS)]
        folder = copy(source, scratch)
        what = mutate(folder, rng)
        outcome, message, begin = "loaded", "", time.process_time()
        signal.alarm(SECONDS)
        try:
            read(how, folder)
        except RLOError as error:
            outcome, message = "refused", str(error)
        except (MemoryError, AssertionError, TooSlowError, RecursionError) as error:
            outcome, message = f"failed: {type(error).__name__}", str(error)
        except Exception as error:
            outcome, message = f"raised {type(error).__name__}", str(error)[:300]
        finally:
            signal.alarm(0)
        record = {"seed": seed, "kind": mutate.__name__, "what": what, "outcome": outcome}
        taken = round(time.process_time() - begin, 3)
        print(json.dumps({**record, "message": message, "seconds": taken}), flush=True)


def copy(source: Path, scratch: Path) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    return Path(shutil.copytree(source, scratch / "model"))


if __name__ == "__main__":
    main()
