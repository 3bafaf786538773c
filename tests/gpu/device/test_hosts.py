"""A step of each host on a GPU: Trainer, timm, a GAN; a model quantized, opened, generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def language_model() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def rows(count: int = 16) -> list[dict[str, Any]]:
    return [{"input_ids": (ids := torch.randint(256, (24,))), "labels": ids} for _ in range(count)]


def trainer(folder: Path, data: list[dict[str, Any]], loss: str, *, steps: int, bf16: bool) -> Any:
    from rlo_hf import Trainer

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        bf16=bf16,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        learning_rate=1e-2,
        seed=3,
    )
    transformers.set_seed(3)
    return Trainer(language_model(), arguments, train_dataset=data, eval_dataset=data, loss=loss)


@pytest.mark.parametrize("loss", ["ce", "rlo:k=5"])
def test_a_trainer_learns_in_bf16_and_evaluates(tmp_path, loss, device):
    if device.type == "cpu":
        pytest.skip("transformers chooses the device")
    made = trainer(tmp_path, rows(), loss, steps=6, bf16=True)
    before = made.evaluate()["eval_ce"]
    made.train()
    assert made.evaluate()["eval_ce"] < before


@pytest.mark.kernels
def test_a_trainer_goes_on_where_it_was_stopped(tmp_path):
    data = rows()
    whole = trainer(tmp_path / "a", data, "rlo:k=5", steps=4, bf16=False)
    whole.train()
    part = trainer(tmp_path / "b", data, "rlo:k=5", steps=4, bf16=False)
    part.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["ce", "rlo:k=8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_timm_model_learns_under_amp(device, loss, dtype):
    import timm
    from rlo_core import create_loss

    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("float16 convolutions are for a GPU")
    model = timm.create_model("resnet10t", num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    criterion = create_loss(loss)
    x, y = torch.randn(8, 3, 64, 64, device=device), torch.randint(10, (8,), device=device)
    losses = []
    for _ in range(6):
        with torch.autocast(device.type, dtype=dtype):
            value = criterion(model(x), y)
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(value.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loss", ["ce", "rlo-convex:k=2"])
@pytest.mark.parametrize("half", [False, True])
def test_a_gan_step_has_finite_gradients(device, loss, half):
    from rlo_stylegan.criterion import GanLoss

    generator = torch.nn.Linear(8, 16).to(device)
    critic = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    critic = critic.to(device)
    criterion = GanLoss(loss)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        fake = generator(torch.randn(32, 8, device=device))
        real = torch.randn(32, 16, device=device) * 30
        total = criterion(-critic(fake), "G").mean()
        total = total + criterion(critic(fake.detach()), "D_fake").mean()
        total = total + criterion(-critic(real), "D_real").mean()
    total.backward()
    for p in (*generator.parameters(), *critic.parameters()):
        assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize(
    "options",
    [{"bits": 2, "incoherence": "hadamard", "rescale": True}, {"bits": 4, "method": "gptq"}],
    ids=["2 bits", "4 bits"],
)
def test_a_quantized_model_is_opened_and_generates(tmp_path, device, options):
    import rlo_gptq
    from rlo_gptq.demo import byte_tokenizer

    language_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the sun was out and the ball was red. " * 40)
    made = rlo_gptq.quantize(
        tmp_path / "model",
        tmp_path / "text.txt",
        save=tmp_path / "packed",
        layer=rlo_gptq.LayerSettings(**options),
        nsamples=4,
        device=device.type,
    )
    assert made is not None
    assert made.layers == 14
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").to(device).eval()
    here = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    ids = torch.randint(256, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            there(ids.to(device)).logits.cpu(), here(ids).logits, rtol=1e-2, atol=1e-2
        )
        out = there.generate(ids.to(device), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 12


@pytest.mark.kernels
def test_generate_with_a_static_cache_compiles_a_packed_model(tmp_path, device):
    import rlo_gptq
    from rlo_gptq.demo import byte_tokenizer

    language_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the sun was out and the ball was red. " * 40)
    rlo_gptq.quantize(
        tmp_path / "model", tmp_path / "text.txt", save=tmp_path / "packed", nsamples=4
    )
    model = rlo_gptq.load(tmp_path / "packed").to(device).eval()
    ids = torch.randint(256, (1, 12), device=device)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    compiled = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(plain, compiled)
