"""The pipeline: resumable to the bit, the same in several processes, and clear when it refuses."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest
import rlo_gptq
import torch
import torch.distributed as dist
import transformers
from rlo_core.errors import RLOError
from rlo_gptq.calibration.block_inputs import record_inputs
from rlo_gptq.calibration.hessian_sum import CalibrationError
from rlo_gptq.calibration.hessians import input_groups
from rlo_gptq.calibration.passes import stages
from rlo_gptq.calibration.sequences import sample_sequences
from rlo_gptq.models.source import ModelSource, SourceError
from rlo_gptq.options import layer_seed
from rlo_gptq.pipeline.processes import Processes
from rlo_gptq.pipeline.work_folder import PARTS, ResumeError
from rlo_gptq.rounding.layer import proxy_loss
from rlo_gptq.settings import LayerSettings
from safetensors.torch import load_file, save_file

FAMILY = "llama-gqa-tied"
LAYER = LayerSettings(bits=3, method="gptq", incoherence="hadamard", rescale=True)


def hang() -> None:
    time.sleep(600)


class HangAt:
    """A progress that stops for good at the given block or layer."""

    def __init__(self, *, block: int | None = None, layer: int | None = None) -> None:
        self.at_block, self.at_layer, self.layers = block, layer, 0

    def block(self, index: int, count: int, status: str) -> None:
        if index == self.at_block:
            hang()

    def layer(self, record: dict) -> None:
        self.layers += 1
        if self.layers == self.at_layer:
            hang()

    def tuned(self, record: dict) -> None:
        pass


def hang_at_sync(number: int) -> None:
    """Stop for good at the n-th file that is about to be put in place."""
    real, calls = os.fsync, []

    def sync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # the folder is synced after each file
            calls.append(descriptor)
            if len(calls) == number:
                hang()
        real(descriptor)

    os.fsync = sync


def kill_when(process, condition) -> None:
    """SIGKILL a process once `condition` holds for some time, i.e. it hangs where it should."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the process did not get that far"
        assert process.is_alive(), "the process ended before it was killed"
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


# Where the run hangs until it is killed; what is on disk by then; blocks that are not done again.
# Files are put in place in this order: plan, rest (2), block 0 (2), block 1 (2), the model.
MOMENTS = {
    "in the middle of the first block": ({"layer": 3}, None, "rest.safetensors", 0),
    "between two blocks": ({"block": 1}, None, "block-00000.safetensors", 1),
    "while the second block is written": ({}, 7, "block-00001.json", 1),
    "while the checkpoint is put together": ({}, 8, "block-00001.safetensors", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(
    moment, model_folder, text_file, quantize_to, quantized, silent, tmp_path
):
    hang_at, sync, witness, whole = MOMENTS[moment]
    folder, out = model_folder(FAMILY), tmp_path / "q"

    def child() -> None:
        if sync is not None:
            hang_at_sync(sync)
        quantize_to(folder, text_file, out, LAYER, progress=HangAt(**hang_at))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    kill_when(process, (out / PARTS / witness).exists)
    assert not (out / "config.json").exists()
    result = quantize_to(folder, text_file, out, LAYER, progress=silent)
    assert result.resumed == sum(status == "replay" for *_, status in silent.blocks)
    assert result.resumed == whole
    assert (out / "model.safetensors").read_bytes() == (
        quantized / "model.safetensors"
    ).read_bytes()
    assert (out / "config.json").read_bytes() == (quantized / "config.json").read_bytes()
    assert len(result.records) == len(silent.layers) == 14
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_a_finished_model_is_not_made_again(model_folder, text_file, quantize_to, tmp_path):
    out = tmp_path / "q"
    quantize_to(model_folder(FAMILY), text_file, out, LAYER)
    before = (out / "model.safetensors").stat().st_mtime_ns
    again = quantize_to(model_folder(FAMILY), text_file, out, LAYER)
    assert again.records == []
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_other_settings_refuse_a_folder_that_was_begun(
    model_folder, text_file, quantize_to, tmp_path
):
    out = tmp_path / "q"
    quantize_to(model_folder(FAMILY), text_file, out, LAYER)
    message = (
        r"was begun with other settings \(nsamples was 4, now 5; tokens was .*; choose another"
    )
    with pytest.raises(ResumeError, match=message):
        quantize_to(model_folder(FAMILY), text_file, out, LAYER, nsamples=5)


def test_a_folder_with_other_things_in_it_is_refused(
    model_folder, text_file, quantize_to, tmp_path
):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match="is not empty and no quantization was begun there; choo"):
        quantize_to(model_folder(FAMILY), text_file, tmp_path, LAYER)


def test_activations_on_disk_give_the_same_bits_as_in_memory(
    model_folder, text_file, quantize_to, quantized, tmp_path
):
    quantize_to(model_folder(FAMILY), text_file, tmp_path / "q", LAYER, offload=True)
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == (
        quantized / "model.safetensors"
    ).read_bytes()


def test_two_processes_give_the_model_of_one_to_rounding(
    model_folder, text_file, quantize_to, quantized, tmp_path
):
    out = tmp_path / "q"

    def worker(rank: int) -> None:
        torch.set_num_threads(1)
        meeting = f"file://{tmp_path / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        quantize_to(
            model_folder(FAMILY),
            text_file,
            out,
            LAYER,
            processes=Processes(rank, 2, torch.device("cpu")),
        )
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=worker, args=(rank,)) for rank in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(300)
    assert [process.exitcode for process in workers] == [0, 0]
    one, two = load_file(quantized / "model.safetensors"), load_file(out / "model.safetensors")
    assert one.keys() == two.keys()
    same = [torch.equal(one[name], two[name]) for name in one]
    assert sum(same) >= 0.9 * len(same)  # sums in another order move a code now and then
    with torch.no_grad():
        ids = torch.arange(2, 34)[None]
        ours, theirs = rlo_gptq.load(quantized)(ids).logits, rlo_gptq.load(out)(ids).logits
    torch.testing.assert_close(ours, theirs, atol=0.3, rtol=0.1)


def test_layers_with_one_input_share_a_group_in_the_order_they_run(model_folder):
    source = ModelSource(model_folder(FAMILY))
    block = source.load_module("model.layers.0")
    source.load(lambda name: "embed" in name)
    blocks = list(source.model.model.layers)
    hidden, calls = record_inputs(source.model, blocks, torch.arange(16), torch.device("cpu"))
    linears = [n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
    groups = input_groups(block, linears, calls[0], hidden)
    assert groups == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert stages(block, groups) == [[group] for group in groups]
    source.close()


def test_the_reported_error_of_the_first_layer_is_that_of_its_stored_weight(
    model_folder, text_file, quantize_to, silent, tmp_path
):
    """Recomputed from the checkpoint and a Hessian of our own, in float64."""
    folder = model_folder("llama")
    quantize_to(folder, text_file, tmp_path / "q", LAYER, progress=silent)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"])
    rows = sample_sequences(ids, count=4, length=32, seed=0)
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(rows)).reshape(-1, 24)
    loaded = rlo_gptq.load(tmp_path / "q").model.layers[0].self_attn.k_proj
    weight = model.model.layers[0].self_attn.k_proj.weight.detach()
    hessian = (x.T @ x / len(x)).double()
    expected = proxy_loss(weight.double(), loaded.dequantize().double(), hessian)
    found = next(r for r in silent.layers if r["layer"] == "model.layers.0.self_attn.k_proj")
    assert found["proxy"] == pytest.approx(expected, rel=1e-3)


def test_true_sequential_changes_later_layers_of_a_block_only(
    model_folder, text_file, quantize_to, quantized, tmp_path
):
    quantize_to(model_folder(FAMILY), text_file, tmp_path / "q", LAYER, true_sequential=False)
    one = load_file(quantized / "model.safetensors")
    two = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.0.{}.weight"
    assert torch.equal(one[name.format("self_attn.q_proj")], two[name.format("self_attn.q_proj")])
    assert not torch.equal(one[name.format("mlp.down_proj")], two[name.format("mlp.down_proj")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "short"}, "calibration text must have at least 32 tokens, got 5; give more"),
        ({"seqlen": 65}, "^seqlen must be at most the model's 64, got 65$"),
        ({"nsamples": 0}, "nsamples must be at least 1 and seqlen 2, got 0 and 32"),
    ],
)
def test_too_little_calibration_is_refused(
    options, message, model_folder, text_file, quantize_to, tmp_path
):
    if options.pop("dataset", None):
        text_file = tmp_path / "short.txt"
        text_file.write_text("short")
    with pytest.raises(CalibrationError, match=message):
        quantize_to(model_folder(FAMILY), text_file, tmp_path / "q", LAYER, **options)
    assert not (tmp_path / "q").exists()  # so that a better command may use the same name


def damaged(folder: Path, out: Path, change) -> Path:
    """A copy of a model with changed tensors."""
    out.mkdir()
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_weights_that_make_activations_nan_are_refused_with_the_layers_name(
    model_folder, text_file, quantize_to, tmp_path
):
    bad = damaged(
        model_folder(FAMILY),
        tmp_path / "bad",
        lambda t: t["model.layers.0.input_layernorm.weight"].fill_(float("nan")),
    )
    with pytest.raises(
        CalibrationError, match=r"inputs of layer 'model.layers.0.self_attn.q_proj' must be finite"
    ):
        quantize_to(bad, text_file, tmp_path / "q", LAYER)


def test_a_weight_that_is_not_finite_is_refused_with_the_layers_name(
    model_folder, text_file, quantize_to, tmp_path
):
    bad = damaged(
        model_folder(FAMILY),
        tmp_path / "bad",
        lambda t: t["model.layers.0.self_attn.k_proj.weight"].fill_(float("inf")),
    )
    with pytest.raises(RLOError, match=r"layer 'model.layers.0.self_attn.k_proj'.*finite"):
        quantize_to(bad, text_file, tmp_path / "q", LAYER)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_with_its_name(
    model_folder, text_file, quantize_to, tmp_path
):
    bad = damaged(
        model_folder(FAMILY),
        tmp_path / "bad",
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
    )
    message = r"the checkpoint lacks tensor 'model.layers.1.mlp.up_proj.weight'"
    with pytest.raises(SourceError, match=message):
        quantize_to(bad, text_file, tmp_path / "q", LAYER)


def test_dead_inputs_of_a_layer_are_quantized_without_harm(
    model_folder, text_file, quantize_to, silent, tmp_path
):
    def kill_inputs(tensors):
        tensors["model.layers.0.input_layernorm.weight"][:10] = 0

    bad = damaged(model_folder(FAMILY), tmp_path / "dead", kill_inputs)
    quantize_to(bad, text_file, tmp_path / "q", LAYER, progress=silent)
    assert all(0 < record["proxy"] < 0.2 for record in silent.layers)


def test_a_quantized_model_is_not_quantized_twice(quantized, text_file, quantize_to, tmp_path):
    with pytest.raises(SourceError, match="is quantized already, with rlo-gptq"):
        quantize_to(quantized, text_file, tmp_path / "q", LAYER)


def test_a_folder_without_weights_is_refused(text_file, quantize_to, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"has no weights: model.safetensors, pytorch_model.bin"):
        quantize_to(tmp_path / "empty", text_file, tmp_path / "q", LAYER)


def test_an_old_torch_file_gives_the_same_model_as_safetensors(
    model_folder, text_file, quantize_to, quantized, tmp_path
):
    old = tmp_path / "old"
    old.mkdir()
    for file in model_folder(FAMILY).iterdir():
        if file.name != "model.safetensors":
            (old / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(model_folder(FAMILY) / "model.safetensors"), old / "pytorch_model.bin")
    quantize_to(old, text_file, tmp_path / "q", LAYER)
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == (
        quantized / "model.safetensors"
    ).read_bytes()


def test_a_bfloat16_model_keeps_its_type_outside_of_the_packed_layers(
    model_folder, text_file, quantize_to, tmp_path
):
    folder = model_folder(FAMILY, torch.bfloat16)
    quantize_to(folder, text_file, tmp_path / "q", LAYER)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    original = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        assert tensors[name].dtype == torch.bfloat16
        assert torch.equal(tensors[name], original[name])


def test_seeds_are_the_same_on_every_machine_and_differ_by_layer():
    assert layer_seed(0, "model.layers.0.mlp.up_proj") == 3653406798022339250
    assert layer_seed(0, "a") != layer_seed(0, "b") != layer_seed(1, "b")


def test_a_shard_that_is_missing_is_named(model_folder, tmp_path):
    folder = tmp_path / "sharded"
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    with pytest.raises(SourceError, match=f"lacks {shards[0].name}"):
        ModelSource(folder)
