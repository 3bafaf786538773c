"""The batches, arguments and oracle of one update, for the tests of this folder."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn


def _sibling(name: str) -> ModuleType:
    """Import a file of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _sibling("tiny_models")
V, CAUSAL, SEQ2SEQ, build = tiny.V, tiny.CAUSAL, tiny.SEQ2SEQ, tiny.build


def examples(name: str, count: int = 8, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return examples of different lengths, some labels ignored."""
    g = torch.Generator().manual_seed(seed)

    def ids(length: int, low: int = 3) -> Tensor:
        return torch.randint(low, V, (length,), generator=g)

    rows: list[dict[str, Any]] = []
    for i in range(count):
        length = 4 + (5 * i) % 9
        if name == "vit":
            rows.append({"pixel_values": torch.randn(3, 8, 8, generator=g), "labels": i % 5})
            continue
        row: dict[str, Any] = {"input_ids": ids(length)}
        if name in CAUSAL or name == "mixtral":
            row["labels"] = row["input_ids"].clone()
            row["labels"][: i % 4] = -100
        elif name in SEQ2SEQ:
            row["labels"] = ids(3 + (7 * i) % 6)
        elif name == "bert_mlm":
            row["labels"] = torch.where(torch.rand(length, generator=g) < 0.5, ids(length), -100)
        elif name == "bert_token":
            row["labels"] = torch.randint(5, (length,), generator=g)
        elif name == "bert_sequence":
            row["labels"] = i % 5
        elif name == "bert_multi_label":
            row["labels"] = torch.randint(2, (5,), generator=g).float()
        rows.append(row)
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad to the longest row of the batch, labels with -100."""
    batch: dict[str, Tensor] = {}
    if "pixel_values" in rows[0]:
        batch["pixel_values"] = torch.stack([row["pixel_values"] for row in rows])
    else:
        ids = [row["input_ids"] for row in rows]
        batch["input_ids"] = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(row) for row in ids])
        steps = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = (steps < lengths.unsqueeze(1)).long()
    labels = [row["labels"] for row in rows]
    if isinstance(labels[0], int):
        batch["labels"] = torch.tensor(labels)
    elif labels[0].is_floating_point():
        batch["labels"] = torch.stack(labels)
    else:
        batch["labels"] = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return batch


def scores_and_labels(
    model: nn.Module, name: str, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return aligned logits and labels of one batch, by hand."""
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if name in SEQ2SEQ:
        start = model.config.decoder_start_token_id
        shifted = torch.cat([torch.full((len(labels), 1), start), labels[:, :-1]], dim=1)
        inputs["decoder_input_ids"] = shifted.masked_fill(
            shifted == -100, model.config.pad_token_id
        )
    logits = model(**inputs).logits
    if name in CAUSAL or name == "mixtral":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits, labels


def rooted_mean(pairs: list[tuple[Tensor, Tensor]], k: float) -> Tensor:
    """Return the mean of k (1 - p^(1/k)) over every kept label of all batches, from the formula."""
    total, count = torch.zeros(()), 0
    for logits, labels in pairs:
        if labels.is_floating_point():
            p = torch.where(labels > 0.5, logits.sigmoid(), (-logits).sigmoid())
            total, count = total + (k * (1 - p ** (1 / k))).sum(), count + labels.numel()
            continue
        kept = labels != -100
        log_p = logits[kept].log_softmax(-1).gather(-1, labels[kept].unsqueeze(-1))
        total = total + (k * (1 - (log_p / k).exp())).sum()
        count += int(kept.sum())
    return total / count


def gradients(model: nn.Module) -> Tensor:
    """Return all gradients as one vector."""
    return torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    )


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


class GrabGradients(transformers.TrainerCallback):
    """Keeps the gradient that the first update has, before any clipping."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.value is None:
            self.value = gradients(kwargs["model"])


def one_update(tmp_path: Any) -> dict[str, Any]:
    """Return the options of one plain step on a CPU, in order and without clipping."""
    return {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "max_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "learning_rate": 0.1,
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }


def arguments(tmp_path: Any, **more: Any) -> transformers.TrainingArguments:
    options: dict[str, Any] = {
        **one_update(tmp_path),
        "remove_unused_columns": False,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
    }
    return arguments_of(transformers.TrainingArguments, {**options, **more})


def arguments_of(kind: Any, options: dict[str, Any]) -> Any:
    """Return the arguments, in the names of the installed version (5.23 renamed some)."""
    known = {field.name for field in dataclasses.fields(kind)}
    renamed = {
        name if name in known else name.replace("activation_", "gradient_"): value
        for name, value in options.items()
    }
    return kind(**renamed)


def update_of(
    trainer_type: Any, model: nn.Module, rows: list[dict[str, Any]], args: Any, **more: Any
) -> Tensor:
    """Return the gradient of one update."""
    grab = GrabGradients()
    trainer = trainer_type(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[grab],
        **more,
    )
    trainer.train()
    assert grab.value is not None
    return grab.value


def expected_gradient(name: str, rows: list[dict[str, Any]], k: float) -> Tensor:
    """Return the gradient of the one mean over all rows, computed by hand."""
    model = build(name).train()
    rooted_mean([scores_and_labels(model, name, collate(rows))], k).backward()
    return gradients(model)


@pytest.fixture(scope="session")
def hf() -> SimpleNamespace:
    """The functions of this file, for the tests of this folder."""
    return SimpleNamespace(
        V=V,
        GrabGradients=GrabGradients,
        arguments=arguments,
        one_update=one_update,
        arguments_of=arguments_of,
        build=build,
        byte_tokenizer=tiny.byte_tokenizer,
        collate=collate,
        examples=examples,
        expected_gradient=expected_gradient,
        gradients=gradients,
        relative_error=relative_error,
        rooted_mean=rooted_mean,
        scores_and_labels=scores_and_labels,
        tiny=tiny,
        update_of=update_of,
    )


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word for each token of the small models."""
    import tokenizers

    words = {f"w{i}": i for i in range(V)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", eos_token="w1", bos_token="w2"
    )
