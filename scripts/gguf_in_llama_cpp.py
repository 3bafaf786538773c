"""What `verify_gguf.py` runs in the environment of llama.cpp: JSON in on stdin, JSON out.

Needs numpy, gguf, `xllamacpp`, whose library is llama.cpp whole, and of `llama-cpp-py-sync` of the
same version the declarations of its functions for cffi.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

F32 = 0


@functools.cache
def shared_library() -> Path:
    """Return the library in xllamacpp."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise SystemExit("xllamacpp is not installed")
    return next(Path(found.origin).parent.glob("xllamacpp*.so"))


@functools.cache
def llama_cpp() -> tuple[Any, Any]:
    """Return cffi's declarations and the library, its log turned off."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi

    ffi = get_ffi()
    lib = ffi.dlopen(str(shared_library()))
    _kept.append(ffi.callback("void(enum ggml_log_level, const char *, void *)", _nothing))
    lib.llama_log_set(_kept[0], ffi.NULL)
    lib.llama_backend_init()
    return ffi, lib


_kept: list[Any] = []


def _nothing(level: Any, text: Any, data: Any) -> None:
    """Take a line of llama.cpp's log."""


class Model:
    """One file in libllama."""

    def __init__(self, path: str, context: int, *, exact: bool) -> None:
        self.ffi, self.lib = llama_cpp()
        options = self.lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(path.encode(), options)
        if self.model == self.ffi.NULL:
            raise SystemExit(f"llama.cpp cannot load {path}")
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = 1
        if exact:  # nothing in half precision
            options.type_k = options.type_v = F32
            options.flash_attn_type = 0
        self.context = self.lib.llama_init_from_model(self.model, options)
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocabulary)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return the logits (tokens, vocabulary) of a fresh sequence."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        batch.n_tokens = len(tokens)
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        pointer = self.lib.llama_get_logits(self.context)
        bytes_ = self.ffi.buffer(pointer, 4 * len(tokens) * self.size)
        found = np.frombuffer(bytes_, dtype=np.float32).reshape(len(tokens), self.size).copy()
        self.lib.llama_batch_free(batch)
        return found

    def tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode()
        out = self.ffi.new(f"llama_token[{len(data) + 8}]")
        count = self.lib.llama_tokenize(
            self.vocabulary, data, len(data), out, len(data) + 8, special, False
        )
        return list(out[0:count])


def perplexity(path: str, windows: list[list[int]]) -> dict[str, float]:
    model = Model(path, max(map(len, windows)), exact=False)
    total = count = 0.0
    for window in windows:
        logits = model.logits(window)[:-1].astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        chosen = logits[np.arange(len(window) - 1), window[1:]]
        total += float((np.log(np.exp(logits).sum(1)) - chosen).sum())
        count += len(window) - 1
    return {"ce": total / count, "perplexity": float(np.exp(total / count)), "tokens": count}


def dequantize_to(source: str, out: str) -> None:
    """Write a file with its matrices dequantised by llama.cpp's own functions, in float32."""
    library = ctypes.CDLL(str(shared_library()))

    def convert(tensor: Any, kind: str) -> tuple[np.ndarray, Any]:
        import gguf

        shape = tuple(int(n) for n in reversed(tensor.shape))
        if kind in ("F32", "F16", "BF16"):
            return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape), F32
        data = np.ascontiguousarray(tensor.data).view(np.uint8)
        found = np.empty(shape, dtype=np.float32)
        name = kind.replace("_K", "_k").lower().replace("_k", "_K")
        function = library[f"dequantize_row_{name}"]
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
        function(data.ctypes.data, found.ctypes.data, found.size)
        return found, F32

    rewrite(source, out, convert, {"general.file_type": F32})


def quantize(source: str, like: str, out: str, imatrix: str) -> None:
    """Quantize with llama.cpp's own quantizer, each matrix to the type that it has in `like`.

    Args:
        source: In float32 or float16.
        like: A file of the same model, whose types are taken.
        out: The new file.
        imatrix: Of numpy arrays, mean squares of each matrix's inputs by its name.
    """
    import gguf

    library = ctypes.CDLL(str(shared_library()))
    chunk = library.ggml_quantize_chunk
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    chunk.restype = ctypes.c_size_t
    wanted = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(like).tensors}
    with np.load(imatrix) as stored:
        importance = {name: stored[name].astype(np.float32) for name in stored.files}

    def convert(tensor: Any, kind: str) -> tuple[np.ndarray, Any]:
        number = wanted[tensor.name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values = np.ascontiguousarray(
            gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape), dtype=np.float32
        )
        if number.name in ("F32", "F16", "BF16"):
            return gguf.quantize(values, number), number
        data = np.empty(gguf.quant_shape_to_byte_shape(shape, number), dtype=np.uint8)
        weights = importance.get(tensor.name)
        address = None if weights is None else weights.ctypes.data
        library.ggml_quantize_init(ctypes.c_int(int(number)))
        size = chunk(
            int(number), values.ctypes.data, data.ctypes.data, 0, shape[0], shape[1], address
        )
        if size != data.nbytes:
            raise SystemExit(f"llama.cpp wrote {size} bytes for {tensor.name}, not {data.nbytes}")
        return data, number

    file_type = gguf.GGUFReader(like).fields["general.file_type"].contents()
    rewrite(source, out, convert, {"general.file_type": file_type})


def rewrite(source: str, out: str, convert: Any, changed: dict[str, Any]) -> None:
    """Copy a file's metadata, and its tensors as `convert` gives them."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        element = field.types[1] if len(field.types) > 1 else None
        value = changed.get(key, field.contents())
        writer.add_key_value(key, value, field.types[0], sub_type=element)
    for tensor in reader.tensors:
        data, number = convert(tensor, tensor.tensor_type.name)
        writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def generate(path: str, prompt: str, count: int) -> dict[str, Any]:
    """Generate with llama.cpp's server code, and time it: tokens a second, prompt left out."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_predict = path, 512, count
    options.cpuparams.n_threads, options.n_parallel = 1, 1
    options.warmup = True
    server = xllamacpp.Server(options)
    answer = server.handle_completions(
        {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    )
    timings = answer.get("timings", {})
    return {
        "text": answer["choices"][0]["text"],
        "tokens_per_second": timings.get("predicted_per_second"),
    }


def speed(path: str, prompt: list[int], count: int) -> dict[str, float]:
    """Greedy decoding in libllama, one thread: tokens a CPU second, prompt left out."""
    model = Model(path, len(prompt) + count, exact=False)
    token = int(model.logits(prompt)[-1].argmax())
    begin, wall = time.process_time(), time.perf_counter()
    for _ in range(count - 1):
        one = model.ffi.new("llama_token[1]", [token])
        if model.lib.llama_decode(model.context, model.lib.llama_batch_get_one(one, 1)):
            raise SystemExit("llama_decode failed")
        pointer = model.lib.llama_get_logits_ith(model.context, -1)
        row = np.frombuffer(model.ffi.buffer(pointer, 4 * model.size), dtype=np.float32)
        token = int(row.argmax())
    cpu, taken = time.process_time() - begin, time.perf_counter() - wall
    return {"per_cpu_second": (count - 1) / cpu, "per_second": (count - 1) / taken}


def main() -> None:
    """Do one task and print its result."""
    task = json.load(sys.stdin)
    kind = task.pop("task")
    result: Any
    if kind == "logits":
        model = Model(task["path"], len(task["tokens"]), exact=True)
        np.save(task["out"], model.logits(task["tokens"]))
        result = {"tokens": model.tokenize(task["text"], True)}
    elif kind == "perplexity":
        result = perplexity(task["path"], task["windows"])
    elif kind in ("quantize", "dequantize"):
        (quantize if kind == "quantize" else dequantize_to)(**task)
        result = {"bytes": Path(task["out"]).stat().st_size}
    elif kind == "speed":
        result = speed(**task)
    else:
        result = generate(**task)
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
