"""The main jobs as functions: what `rlo-gptq quantize` and `rlo-gptq eval` call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rlo_gptq.bit_rules import parse_rules
from rlo_gptq.budget import Budget
from rlo_gptq.options import PLAIN, Options
from rlo_gptq.settings import EndToEndSettings, LayerSettings, TuneSettings


@dataclass(frozen=True)
class QuantizeResult:
    """What a quantization made.

    Args:
        folder: The checkpoint's, or that of the GGUF file.
        layers: Quantized layers inside of the decoder blocks.
        bits: Of their codes.
        bits_per_weight: Of those layers, scales and zeros included, a mean over their weights.
        mean_proxy: Mean over the layers of the proxy loss tr(dW H dW^T) / tr(W H W^T).
        worst_proxy: The largest of them.
        worst_layer: Its layer.
        bytes: Of the weight files.
        quantized_parameters: Weights in those layers.
        embedding: What was done with the token embedding, in words.
        head: The same of the output head.
        resumed_blocks: Blocks that were on disk already.
        seconds: It took.
        already_done: It was complete before this call.
        gguf: Type of the GGUF file, if one was made.
        block_error_before: Mean error of the blocks on held-out sequences, before `tune`.
        block_error_after: The same afterwards.
        end_to_end: What the tuning end to end reports, if there was one.
        allocation: The bits that were chosen within a size, and what is predicted of them.
    """

    folder: Path
    layers: int
    bits: int
    bits_per_weight: float
    mean_proxy: float
    worst_proxy: float
    worst_layer: str
    bytes: int
    quantized_parameters: int
    embedding: str
    head: str
    resumed_blocks: int
    seconds: float
    already_done: bool = False
    gguf: str | None = None
    block_error_before: float | None = None
    block_error_after: float | None = None
    end_to_end: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None


def quantize(
    model: str | Path,
    data: str | Path,
    *,
    save: str | Path,
    layer: LayerSettings | None = None,
    embed_bits: int | None = None,
    head_bits: int | None = None,
    bits: str | Mapping[str, int] = "",
    max_bytes: int | None = None,
    average_bits: float | None = None,
    rotate: str | None = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    split: str | None = None,
    hessian: str = PLAIN,
    hessian_energy: bool = False,
    tune: TuneSettings | None = None,
    end_to_end: EndToEndSettings | None = None,
    true_sequential: bool = True,
    skip: Sequence[str] = (),
    gguf: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    offload: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> QuantizeResult | None:
    """Quantize a causal language model, one decoder block at a time, into a packed checkpoint.

    The same call goes on where it was stopped, to the same bits.

    Args:
        model: A folder (safetensors, or an old torch file), a GGUF file or a hub name.
        data: Calibration text: "wikitext2", "c4", "ptb", a text file, a folder, jsonl or parquet.
        save: The new checkpoint's folder.
        layer: How each layer is rounded; None is 2 bits by ldlqRG with incoherence processing.
        embed_bits: Bits of the token embedding; 16 and 32 leave it; None is 8 where layers have at
            most 4.
        head_bits: Bits of the output head, likewise; a tied head has those of the embedding.
        bits: Of some layers, by parts of their names: "mlp.down_proj=4,layers.0=6" or a mapping; of
            two that match the later wins.
        max_bytes: Choose the bits of every layer, of embedding and head, within this size of the
            weight files, from probes of each layer's effect on the output.
        average_bits: The same, within the size of a uniform model of so many bits.
        rotate: "fold" folds random rotations into the weights: incoherence at no run-time cost.
        nsamples: Calibration sequences.
        seqlen: Tokens in each; None is the model's length, at most 2048.
        seed: Of sequences, rotations and stochastic rounding.
        split: Of the data; None is "train", else "validation".
        hessian: "plain", or a loss spec by whose slope calibration tokens are weighted.
        hessian_energy: Weight them by that loss's squared gradient instead.
        tune: Finetune each block's scales and norms against its dense output.
        end_to_end: Finetune the packed model against the dense one's output afterwards.
        true_sequential: Inside a block, later layers see the earlier ones quantized.
        skip: Patterns of full layer names that stay as they are.
        gguf: Type of a GGUF file to make instead of a checkpoint, e.g. "Q4_K_M".
        device: "auto" is the GPU if there is one; "cpu", "cuda", ...
        dtype: In which blocks are run: "float32", "bfloat16" or "float16".
        offload: Keep activations in a file.
        trust_remote_code: Let transformers run code from the model's folder.
        progress: Show progress on stderr.

    Returns:
        What was made; None in all processes of a torchrun but the first.

    Raises:
        ValueError: an option is out of its range, or two exclude each other.
        RLOError: the model, the data or the folder is refused; one line says why.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> import rlo_gptq, transformers
        >>> from rlo_gptq.demo import byte_tokenizer
        >>> folder = Path(mkdtemp())
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=256, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        ...     num_attention_heads=4, max_position_embeddings=32,
        ... )
        >>> transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
        >>> _ = byte_tokenizer().save_pretrained(folder / "model")
        >>> _ = (folder / "text.txt").write_text("the sun was out and the ball was red. " * 20)
        >>> made = rlo_gptq.quantize(
        ...     folder / "model", folder / "text.txt", save=folder / "packed", nsamples=4
        ... )
        >>> made.layers, made.bits
        (14, 2)
        >>> model = rlo_gptq.load(folder / "packed")
        >>> result = rlo_gptq.evaluate(folder / "packed", folder / "text.txt", max_tokens=64)
        >>> result.tokens
        62
    """
    options = Options(
        model=str(model),
        dataset=str(data),
        layer=layer or LayerSettings(incoherence="hadamard", rescale=True),
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        true_sequential=true_sequential,
        skip=tuple(skip),
        dtype=dtype,
        offload=offload,
        trust_remote_code=trust_remote_code,
        split=split,
        hessian=hessian,
        hessian_energy=hessian_energy,
        rotate=rotate,
        tune=tune,
        end_to_end=end_to_end,
        embed_bits=embed_bits,
        head_bits=head_bits,
        gguf=gguf,
        bits=parse_rules(bits) if bits else (),
    )
    budget = None
    if max_bytes is not None or average_bits is not None:
        budget = Budget(max_bytes, average_bits)
    from rlo_gptq.pipeline.run import run_quantization

    document = run_quantization(
        options, Path(save), device=device, progress=progress, budget=budget
    )
    return None if document is None else quantize_result(document)


def quantize_result(document: dict[str, Any]) -> QuantizeResult:
    """Return the summary of `run_quantization`, typed."""
    names = {field.name for field in fields(QuantizeResult)}
    known = {name: value for name, value in document.items() if name in names}
    return QuantizeResult(**{**known, "folder": Path(document["folder"])})


@dataclass(frozen=True)
class EvalResult:
    """How well a model predicts a text.

    Args:
        perplexity: exp(ce).
        ce: Cross entropy in nats per predicted token.
        tokens: Predicted tokens.
        context: Tokens of a window; the first of each is not predicted.
        bytes: Of the model's weight files.
        seconds: It took, without loading.
        model: As it was named.
        dataset: As it was named.
        split: Of the data.
        fingerprint: Of the text.
        calibrated_on_it: The model was calibrated or tuned on this very text, so that the number
            says too little.
    """

    perplexity: float
    ce: float
    tokens: int
    context: int
    bytes: int
    seconds: float
    model: str
    dataset: str
    split: str
    fingerprint: str
    calibrated_on_it: bool = False


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    split: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    progress: Callable[[int, int], object] | None = None,
) -> EvalResult:
    """Measure the perplexity of a model on a text, in windows that do not overlap.

    Args:
        model: A folder, a GGUF file, a hub name or an adapter's folder; quantized or not.
        data: "wikitext2", "c4", "ptb", a text file, a folder, jsonl or parquet.
        context: Tokens of a window; None is the model's length, at most 2048.
        max_tokens: Use only the beginning of the text.
        split: Of the data; None is "test", else "validation".
        device: "auto" is the GPU if there is one; "cpu", "cuda", ...
        dtype: Of weights that are not packed, and of activations.
        progress: Called with windows done and windows in all.

    Raises:
        RLOError: the model or the data cannot be found or read.

    Example:
        See `quantize`.
    """
    from rlo_gptq.evaluation.perplexity import evaluate_perplexity

    document = evaluate_perplexity(
        str(model),
        str(data),
        context=context,
        max_tokens=max_tokens,
        device=device,
        dtype=dtype,
        split=split,
        progress=progress,
    )
    return EvalResult(**document)
