"""A training step of the Trainer and of TRL's SFTTrainer, ours and stock; gates; peers.

A Llama of two layers with a vocabulary of 32,000, where the output layer is most of the step, as it
is for small models with large vocabularies (SmolLM2-135M: 49,152 x 576). One thread, process time,
interleaved. Liger's and cut-cross-entropy's kernels are Triton: they do not run on a CPU.

    python benchmarks/bench_hf.py [--rounds 12] [--vocabulary 128256]
    python benchmarks/bench_hf.py --memory
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers
from harness import compare, peak_memory, write_results

VOCABULARY, WIDTH, ROWS, LENGTH = 32_000, 256, 4, 256

CANDIDATES = (
    "stock ce",
    "rlo, logits",
    "rlo, fused",
    "ce, fused",
    "ce*eaft, fused",
    "ce*deft, fused",
    "ce*topk:0.6, fused",
    "SFT stock nll",
    "SFT stock dft",
    "SFT ours, rlo",
    "SFT ours, ce*eaft",
    "trl chunked nll",
    "torch chunked ce",
)
MEMORY = """
import sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
import bench_hf
bench_hf.VOCABULARY = {vocabulary}
step = bench_hf.candidates({kind!r})[{kind!r}]
# measure
step(); step()
"""


def model() -> Any:
    """Return the Llama, the same weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    return transformers.LlamaForCausalLM(config)


def candidates(only: str | None = None) -> dict[str, Callable[[], object]]:
    """Return forward and backward of one batch under each trainer, by name."""
    from rlo_hf import Trainer

    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    batch = {"input_ids": ids, "labels": ids}
    count = torch.tensor(ROWS * (LENGTH - 1))
    args = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, report_to=[], disable_tqdm=True
    )

    def step_of(trainer_type: Any, **more: Any) -> Callable[[], object]:
        trainer = trainer_type(model(), args, **more)
        trainer.current_gradient_accumulation_steps = 1

        def step() -> object:
            trainer.model.zero_grad(set_to_none=True)
            return trainer.training_step(trainer.model, dict(batch), count)

        return step

    def sft(kind: str, **more: Any) -> Callable[[], object]:
        """The SFTTrainer of TRL or ours, on a batch that it has collated."""
        import datasets
        import tokenizers
        import trl
        from rlo_hf.trl import SFTTrainer

        words = tokenizers.models.WordLevel({f"w{i}": i for i in range(8)}, unk_token="w0")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(words), pad_token="w0", eos_token="w1"
        )
        options = {"loss_type": more.pop("loss_type")} if "loss_type" in more else {}
        trainer = {"stock": trl.SFTTrainer, "ours": SFTTrainer}[kind](
            model(),
            trl.SFTConfig(
                output_dir=tempfile.mkdtemp(),
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                bf16=False,
                activation_checkpointing=False,
                **options,
            ),
            train_dataset=datasets.Dataset.from_list([{"input_ids": [2, 3], "labels": [2, 3]}]),
            processing_class=tokenizer,
            **more,
        )
        trainer.current_gradient_accumulation_steps = 1
        given = {**batch, "attention_mask": torch.ones_like(ids)}

        def step() -> object:
            trainer.model.zero_grad(set_to_none=True)
            return trainer.training_step(trainer.model, dict(given), count)

        return step

    def chunked() -> Callable[[], object]:
        """TRL's fused output layer, as its SFTTrainer calls it."""
        from trl.trainer.utils import add_fused_lm_head

        llama = model()
        add_fused_lm_head(llama, outputs=("log_probs", "entropy", "is_top1"))

        def step() -> object:
            llama.zero_grad(set_to_none=True)
            output = llama(**batch, fused_lm_head=True)
            loss = -output.log_probs.sum() / count
            loss.backward()
            return loss

        return step

    def torch_chunked() -> Callable[[], object]:
        """torch's own fused linear cross entropy, on the hidden states."""
        llama = model()
        target = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None)

        def step() -> object:
            llama.zero_grad(set_to_none=True)
            hidden = llama.model(ids).last_hidden_state.flatten(0, 1)
            weight = llama.lm_head.weight
            loss = torch.nn.functional.linear_cross_entropy(hidden, weight, target, options=options)
            loss.backward()
            return loss

        return step

    made: dict[str, Callable[[], Callable[[], object]]] = {
        "stock ce": lambda: step_of(transformers.Trainer),
        "rlo, logits": lambda: step_of(Trainer, loss="rlo:k=5,m=5", linear="off"),
        "rlo, fused": lambda: step_of(Trainer, loss="rlo:k=5,m=5", linear="fused"),
        "ce, fused": lambda: step_of(Trainer, loss="ce", linear="fused"),
        "ce*eaft, fused": lambda: step_of(Trainer, loss="ce*eaft", linear="fused"),
        "ce*deft, fused": lambda: step_of(Trainer, loss="ce*deft", linear="fused"),
        "ce*topk:0.6, fused": lambda: step_of(Trainer, loss="ce*topk:0.6", linear="fused"),
        "SFT stock nll": lambda: sft("stock"),
        "SFT stock dft": lambda: sft("stock", loss_type="dft"),
        "SFT ours, rlo": lambda: sft("ours", loss="rlo:k=5,m=5"),
        "SFT ours, ce*eaft": lambda: sft("ours", loss="ce*eaft"),
        "trl chunked nll": chunked,
        "torch chunked ce": torch_chunked,
    }
    return {name: make() for name, make in made.items() if only in (None, name)}


def shape() -> str:
    return f"{ROWS}x{LENGTH} tokens, width {WIDTH}, vocabulary {VOCABULARY}, fp32"


def measure_memory() -> None:
    """Write the growth of peak memory over two steps, each candidate in a process of its own."""
    here = __file__.rpartition("/")[0]
    records = []
    for name in CANDIDATES:
        peak = peak_memory(MEMORY.format(path=[here], kind=name, vocabulary=VOCABULARY))
        records.append({"candidate": name, "shape": shape(), "peak_mb": round(peak / 2**20)})
        print(records[-1], flush=True)
    write_results("hf_memory", records)


def measure_time(rounds: int) -> None:
    """Write the process time of a step."""
    times = compare(candidates(), rounds=rounds, warmup=1)
    base = times["stock ce"]
    records = []
    for name, time in times.items():
        records.append(
            {
                "candidate": name,
                "shape": shape(),
                "rounds": rounds,
                **{key: round(value, 4) for key, value in time.items()},
                "ratio": round(time["median"] / base["median"], 4),
                "ratio_min": round(time["min"] / base["min"], 4),
            }
        )
        print(records[-1], flush=True)
    write_results("hf", records)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--memory", action="store_true", help="memory, not time")
    arguments = parser.parse_args()
    globals()["VOCABULARY"] = arguments.vocabulary
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    if arguments.memory:
        measure_memory()
    else:
        measure_time(arguments.rounds)


if __name__ == "__main__":
    main()
