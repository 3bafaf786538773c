"""A loss with `+kl`: held to a reference model, or to the model without its adapters."""

import json

import pytest
import torch
from rlo_core.errors import RLOError, SpecError
from rlo_hf import Trainer, loss_func, set_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
SPEC = "dft+kl:beta=0.3,temperature=1.5"


def scaled(hf, factor):
    model = hf.build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def anchored(hf, model, reference, rows):
    """The mean of sg(p) ce + 0.3 T^2 KL(q_T || p_T) over the kept labels, in float64."""
    model, reference = model.double().train(), reference.double()
    batch = hf.collate(rows)
    logits, labels = hf.scores_and_labels(model, "llama", batch)
    with torch.no_grad():
        other, _ = hf.scores_and_labels(reference, "llama", batch)
    kept = labels != -100
    z, r = logits[kept], other[kept]
    own = z.log_softmax(-1).gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1)
    p, q = (z / 1.5).softmax(-1), (r / 1.5).softmax(-1)
    rows = -own.exp().detach() * own + 0.3 * 1.5**2 * (q * (q / p).log()).sum(-1)
    loss = rows.mean()
    loss.backward()
    return loss.item(), hf.gradients(model)


@pytest.mark.parametrize("linear", ["off", "fused"])
@pytest.mark.parametrize(("batch", "steps"), [(8, 1), (2, 4)])
def test_an_update_has_the_gradient_of_the_formula(tmp_path, hf, linear, batch, steps):
    rows = hf.examples("llama")
    args = hf.arguments(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps
    )
    got = hf.update_of(
        Trainer,
        hf.build("llama"),
        rows,
        args,
        loss=SPEC,
        linear=linear,
        reference_model=scaled(hf, 0.9),
    )
    _, expected = anchored(hf, hf.build("llama"), scaled(hf, 0.9), rows)
    assert hf.relative_error(got.double(), expected) < 3e-6


@pytest.mark.parametrize("linear", ["off", "fused"])
def test_the_model_without_its_adapters_is_the_reference(tmp_path, hf, linear):
    peft = pytest.importorskip("peft")

    def adapted():
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model = peft.get_peft_model(hf.build("llama"), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        return model

    rows, args = hf.examples("llama"), hf.arguments(tmp_path)
    got = hf.update_of(Trainer, adapted(), rows, args, loss=SPEC, linear=linear)
    _, expected = anchored(hf, adapted(), hf.build("llama"), rows)
    assert hf.relative_error(got.double(), expected) < 3e-6


def test_token_weights_multiply_the_term_too(tmp_path, hf):
    """Weights of 2 everywhere change nothing, those of one half of the rows leave the other out."""
    rows = hf.examples("llama")
    part = [dict(row, loss_weight=float(i % 2)) for i, row in enumerate(rows)]
    args = hf.arguments(tmp_path)
    given = {"loss": SPEC, "reference_model": scaled(hf, 0.9)}
    got = hf.update_of(Trainer, hf.build("llama"), part, args, **given)
    _, expected = anchored(hf, hf.build("llama"), scaled(hf, 0.9), rows[1::2])
    assert hf.relative_error(got.double(), expected) < 3e-6


def test_trls_trainer_takes_the_reference(tmp_path, hf, sft):
    trainer, grab = sft(tmp_path, loss=SPEC, slot={"reference_model": scaled(hf, 0.9)})
    trainer.train()
    _, expected = anchored(hf, hf.build("llama"), scaled(hf, 0.9), hf.examples("llama"))
    assert hf.relative_error(grab.value.double(), expected) < 3e-6


def test_trls_trainer_takes_the_model_without_its_adapters(tmp_path, hf, sft):
    """With adapters that do nothing yet the term has no gradient."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    grads = []
    for loss in ("ce", "ce+kl:beta=5"):
        torch.manual_seed(0)
        trainer, grab = sft(tmp_path, loss=loss, peft_config=config)
        trainer.train()
        grads.append(grab.value)
    assert hf.relative_error(*grads) < 3e-6


def test_trls_trainer_takes_a_function_of_the_batch(tmp_path, hf, sft):
    def focal(batch, stats):
        assert "input_ids" in batch
        return (1 - stats.p) ** 2

    trainer, grab = sft(tmp_path, loss="ce", slot={"weights": focal})
    trainer.train()
    model = hf.build("llama").train()
    logits, labels = hf.scores_and_labels(model, "llama", hf.collate(hf.examples("llama")))
    kept = labels != -100
    log_p = logits[kept].log_softmax(-1).gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1)
    ((1 - log_p.exp().detach()) ** 2 * -log_p).mean().backward()
    assert hf.relative_error(grab.value, hf.gradients(model)) < 3e-6


@pytest.fixture
def sft(hf):
    """An SFTTrainer on the tiny Llama's eight rows, in one batch."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    def of(tmp_path, *, loss, peft_config=None, slot=None):
        from rlo_hf.trl import SFTTrainer

        given = {
            **hf.one_update(tmp_path),
            "per_device_train_batch_size": 8,
            "max_length": 32,
            "bf16": False,
            "activation_checkpointing": False,
        }
        rows = [
            {name: row[name].tolist() for name in ("input_ids", "labels")}
            for row in hf.examples("llama")
        ]
        grab = hf.GrabGradients()
        trainer = SFTTrainer(
            model=hf.build("llama"),
            args=hf.arguments_of(trl.SFTConfig, given),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=hf.byte_tokenizer(eos_token="~", pad_token="!"),
            callbacks=[grab],
            peft_config=peft_config,
            loss=loss,
            **(slot or {}),
        )
        return trainer, grab

    return of


def test_a_reference_that_is_missing_or_does_not_fit_is_refused(tmp_path, hf):
    model, args = hf.build("llama"), hf.arguments(tmp_path)
    with pytest.raises(RLOError, match=r"^loss 'ce\+kl' needs a reference: give reference_model="):
        Trainer(model, args, loss="ce+kl")
    with pytest.raises(
        RLOError, match=r"^reference_model is for a loss with '\+kl', got 'ce'; for"
    ):
        Trainer(model, args, loss="ce", reference_model=model)
    other = hf.tiny.build("llama", vocab_size=40)
    with pytest.raises(RLOError, match=r"^the reference must have the vocabulary of the model, 37"):
        Trainer(model, args, loss="ce+kl", reference_model=other)
    with pytest.raises(
        RLOError, match=r"^a loss with '\+kl' needs a causal language model, got to"
    ):
        Trainer(hf.build("bert_token"), args, loss="ce+kl", reference_model=model)
    for door in (lambda: loss_func("ce+kl"), lambda: set_loss(model, "ce+kl")):
        with pytest.raises(SpecError, match=r"needs a reference model, which this door cannot giv"):
            door()


def test_finetune_follows_a_teacher(tmp_path, hf, folder_of_text):
    from click.testing import CliRunner
    from rlo_hf.cli import main

    model, text = folder_of_text
    words = ["finetune", model, text, "--loss", "rlo:k=5", "--teacher", model, "--max-steps", 2,
             "--block", 16, "--batch-size", 2, "--out", tmp_path / "run", "--json"]  # fmt: skip
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["loss"] == "rlo:k=5+kl:beta=1"
    words = ["finetune", model, text, "--loss", "ce+kl", "--out", tmp_path / "other"]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 1
    assert "needs a reference: --teacher MODEL, or --lora RANK" in result.output


@pytest.fixture(scope="module")
def folder_of_text(tmp_path_factory, hf):
    home = tmp_path_factory.mktemp("teacher")
    hf.tiny.build("llama", vocab_size=257, length=64).save_pretrained(home / "llama")
    hf.byte_tokenizer(eos_token="<end>").save_pretrained(home / "llama")
    (home / "text.txt").write_text("".join(f"{i} and {i + 1}.\n" for i in range(200)))
    return home / "llama", home / "text.txt"
