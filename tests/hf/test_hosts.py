"""What would pass the loss slot by is refused, or made to leave the loss alone."""

import logging
from types import SimpleNamespace

import pytest
from rlo_core.errors import RLOError
from rlo_hf import Trainer
from rlo_hf.conventions import refuse_hosts


def host(n_gpu=1, liger=False, config=None, backend=None):
    parallel = None if backend is None else SimpleNamespace(sp_backend=backend, sp_enabled=True)
    return SimpleNamespace(
        args=SimpleNamespace(n_gpu=n_gpu, use_liger_kernel=liger, liger_kernel_config=config),
        accelerator=SimpleNamespace(parallelism_config=parallel),
    )


def test_several_gpus_in_one_process_are_refused():
    with pytest.raises(RLOError, match=r"^nn\.DataParallel over 4 GPUs is not supported"):
        refuse_hosts(host(n_gpu=4))


def test_deepspeed_sequence_parallelism_is_refused():
    with pytest.raises(RLOError, match=r"^DeepSpeed sequence parallelism passes the loss slot by"):
        refuse_hosts(host(backend="deepspeed"))
    refuse_hosts(host(backend="torch"))


def test_ligers_cross_entropy_is_turned_off_and_its_kernels_stay(caplog):
    given = host(liger=True, config={"rope": True})
    with caplog.at_level(logging.WARNING, logger="rlo_hf.conventions"):
        refuse_hosts(given)
    assert given.args.liger_kernel_config == {
        "rope": True,
        "fused_linear_cross_entropy": False,
        "cross_entropy": False,
    }
    assert "Liger's cross entropy is off, its other kernels are on" in caplog.text
    with pytest.raises(RLOError, match=r"^liger_kernel_config must leave fused_linear"):
        refuse_hosts(host(liger=True, config={"fused_linear_cross_entropy": True}))


@pytest.mark.slow
def test_a_compiled_model_has_the_exact_gradient_on_the_path_with_logits(tmp_path, hf, caplog):
    rows, model = hf.examples("llama"), hf.build("llama")
    args = hf.arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    with caplog.at_level(logging.WARNING, logger="rlo_hf.linear_path"):
        got = hf.update_of(Trainer, model, rows, args, loss="rlo:k=5", linear="off")
    assert "linear path: logits (linear='off')" in caplog.text
    assert hf.relative_error(got, hf.expected_gradient("llama", rows, 5.0)) < 3e-6


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("linear", ["off", "fused"])
def test_adapters_have_the_gradient_of_the_formula(tmp_path, hf, linear):
    peft = pytest.importorskip("peft")
    import torch

    rows = hf.examples("llama")

    def adapted():
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(hf.build("llama"), config)
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
        return model

    args = hf.arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    got = hf.update_of(Trainer, adapted(), rows, args, loss="rlo:k=5", linear=linear)
    model = adapted().train()
    hf.rooted_mean([hf.scores_and_labels(model, "llama", hf.collate(rows))], 5.0).backward()
    assert hf.relative_error(got, hf.gradients(model)) < 2e-6


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_virtual_prompt_tokens_are_not_labels(tmp_path, hf):
    peft = pytest.importorskip("peft")
    rows = hf.examples("llama")
    torch = pytest.importorskip("torch")

    def prompted():
        torch.manual_seed(2)
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        return peft.get_peft_model(hf.build("llama"), config)

    args = hf.arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    got = hf.update_of(Trainer, prompted(), rows, args, loss="rlo:k=5", linear="off")
    model, batch = prompted().train(), hf.collate(rows)
    labels = batch.pop("labels")
    # As stock: the last virtual token predicts the first real one, and virtual ones are no labels.
    logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1]
    hf.rooted_mean([(logits, labels)], 5.0).backward()
    assert hf.relative_error(got, hf.gradients(model)) < 2e-6
