"""`rlo-hf finetune`: real runs of a tiny model, and every refusal."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
from click.testing import CliRunner
from rlo_core.errors import RunError
from rlo_core.lm.models import ModelError, open_model
from rlo_core.runs.folder import lock_folder
from rlo_core.runs.record import read_metrics, read_run
from rlo_hf.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hf):
    """A tiny Llama with a byte-level tokenizer, as a folder, and text to train on."""
    home = tmp_path_factory.mktemp("model")
    tokenizer = hf.byte_tokenizer(eos_token="~")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(home / "llama")
    tokenizer.save_pretrained(home / "llama")
    lines = [f"{i} times {j} is {i * j}.\n" for i in range(20) for j in range(20)]
    (home / "text.txt").write_text("".join(lines))
    return home


def call(*words):
    result = CliRunner().invoke(main, ["finetune", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result


FAST = ("--block", 32, "--batch-size", 4, "--lr", 3e-3, "--max-steps", 12, "--warmup", 2)


@pytest.mark.parametrize("loss", ["ce", "rlo"])
def test_it_lowers_held_out_perplexity_and_saves_a_model(folder, tmp_path, loss):
    out = tmp_path / "run"
    result = call(
        folder / "llama", folder / "text.txt", "--loss", loss, "--out", out, "--json", *FAST
    )
    summary = json.loads(result.stdout)
    assert summary["perplexity_before"] == pytest.approx(256, rel=0.15)
    assert summary["perplexity_after"] < 0.5 * summary["perplexity_before"]
    assert summary["steps"] == 12
    document = read_run(out)
    assert document["loss"] == summary["loss"] == {"ce": "ce", "rlo": "rlo:k=5,m=5"}[loss]
    assert document["options"]["block"] == 32
    assert document["status"] == "done"
    assert len(document["data"]["train"][1]) == 16
    steps = [row["step"] for row in read_metrics(out) if row["split"] == "eval"]
    assert steps == [0, 12]
    assert (out / "report.html").stat().st_size > 1000
    assert not (out / "checkpoints").exists()
    again = call(out / "model", folder / "text.txt", "--eval-only", "--out", tmp_path / "e",
                 "--eval-split", "validation", "--json")  # fmt: skip
    assert "perplexity_after" not in json.loads(again.stdout)


def test_the_authors_defaults_are_the_defaults(folder):
    plan = json.loads(call(folder / "llama", "wikitext2", "--dry-run").stdout)
    expected = {
        "loss": "rlo:k=5,m=5",
        "epochs": 3.0,
        "block": 256,
        "learning_rate": 1e-5,
        "weight_decay": 0.01,
        "accumulation": 2,
        "precision": "auto",
    }
    assert {key: plan[key] for key in expected} == expected
    plan = json.loads(
        call("m", "d", "--dry-run", "--loss", "rlo", "--k", 8, "--block_size", 7).stdout
    )
    assert (plan["loss"], plan["block"]) == ("rlo:k=8,m=5", 7)


def test_an_interrupted_run_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch):
    import rlo_hf.finetuning.trainer as module

    words = (folder / "llama", folder / "text.txt", "--block", 32, "--batch-size", 8,
             "--epochs", 2, "--lr", 1e-3)  # fmt: skip
    call(*words, "--out", tmp_path / "whole")

    class Stop(module.Record):
        def on_epoch_end(self, args, state, control, **kwargs):
            super().on_epoch_end(args, state, control, **kwargs)

        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "Record", Stop)
        result = CliRunner().invoke(
            main, ["finetune", *map(str, words), "--out", str(tmp_path / "cut")]
        )
    assert result.exit_code == 130
    assert read_run(tmp_path / "cut")["status"] == "interrupted"
    other = CliRunner().invoke(
        main, ["finetune", *map(str, words), "--out", str(tmp_path / "cut"), "--resume",
               "--seed", "1"],
    )  # fmt: skip
    assert other.exit_code == 1
    assert re.search(r"has seed=42, got 1; resume with the same options", other.output)
    call(*words, "--out", tmp_path / "cut", "--resume")
    whole = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    cut = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "cut" / "model")
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def cut_after(monkeypatch, out, step, *words):
    """Run until the checkpoint of a step is written, and stop as by Ctrl-C."""
    import rlo_hf.finetuning.trainer as module

    class Stop(module.Record):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "Record", Stop)
        result = CliRunner().invoke(main, ["finetune", *map(str, words), "--out", str(out)])
    assert result.exit_code == 130, result.output


def test_a_run_goes_on_from_the_newest_whole_checkpoint(folder, tmp_path, monkeypatch):
    """What a full disk or a power cut leaves is passed over, with the reason."""
    words = (folder / "llama", folder / "text.txt", "--block", 32, "--batch-size", 8,
             "--max-steps", 7, "--lr", 1e-3, "--save-steps", 2, "--accumulation", 1)  # fmt: skip
    call(*words, "--out", tmp_path / "whole")
    cut_after(monkeypatch, tmp_path / "cut", 6, *words)
    checkpoints = tmp_path / "cut" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    (checkpoints / "checkpoint-6" / "trainer_state.json").write_bytes(b"")
    (checkpoints / "checkpoint-8").mkdir()
    (checkpoints / "checkpoint-8" / "config.json").write_text("{}")
    result = call(*words, "--out", tmp_path / "cut", "--resume")
    assert "checkpoint-8 is not whole (trainer_state.json is not there)" in result.stderr
    assert "checkpoint-6 is not whole (trainer_state.json is not whole)" in result.stderr
    whole = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    cut = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "cut" / "model")
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    seen = [(row["step"], row["split"]) for row in read_metrics(tmp_path / "cut")]
    assert len(seen) == len(set(seen))
    assert seen == [(row["step"], row["split"]) for row in read_metrics(tmp_path / "whole")]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_with_a_file_that_was_cut_off_is_not_whole(
    folder, tmp_path, monkeypatch, name
):
    words = (folder / "llama", folder / "text.txt", *FAST, "--save-steps", 2)
    cut_after(monkeypatch, tmp_path / "cut", 2, *words)
    path = tmp_path / "cut" / "checkpoints" / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[:-100])
    words = ["finetune", *map(str, words), "--out", str(tmp_path / "cut"), "--resume"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "has no whole checkpoint to resume from: checkpoint-2 is not whole" in result.output
    assert f"({name} is not whole); start it again without --resume" in result.output


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one(folder, tmp_path, monkeypatch):
    from rlo_hf import FinetuneOptions, finetune
    from rlo_hf.trainer import Trainer

    save = Trainer._save_rng_state

    def full(self, output_dir):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_rng_state", full)
    options = FinetuneOptions(str(folder / "llama"), str(folder / "text.txt"), block=32,
                              max_steps=6, out=str(tmp_path / "run"))  # fmt: skip
    with pytest.raises(RunError, match=r"^checkpoint-4 could not be written: .*No space left on d"):
        finetune(options, save_steps=2)
    left = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert left == ["checkpoint-2"]


def test_python_has_the_commands_result_with_names(folder, tmp_path):
    from rlo_hf import FinetuneOptions, FinetuneResult, finetune

    options = FinetuneOptions(str(folder / "llama"), str(folder / "text.txt"), loss="ce", block=32,
                              max_steps=2, out=str(tmp_path / "run"))  # fmt: skip
    result = finetune(options)
    assert isinstance(result, FinetuneResult)
    assert result.steps == 2
    assert result.linear_path == "fused"
    assert result.summary() == read_run(tmp_path / "run")["summary"]
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, got 0$"):
        FinetuneOptions("m", "d", batch_size=0)
    with pytest.raises(ValueError, match=r"^save_steps must be at least 1, got 0$"):
        finetune(options, save_steps=0)


def test_a_plan_says_where_it_would_push_and_pushes_nothing():
    plan = json.loads(call("m", "d", "--dry-run", "--push", "me/model", "--save-steps", 5).stdout)
    assert (plan["push"], plan["save_steps"]) == ("me/model", 5)
    result = CliRunner().invoke(main, ["finetune", "m", "d", "--batch-size", "0"])
    assert result.exit_code == 2
    assert "0 is not in the range x>=1" in result.output


def test_adapters_are_saved_alone_or_merged_and_load_on_their_base(folder, tmp_path):
    pytest.importorskip("peft")
    words = (folder / "llama", folder / "text.txt", "--lora", 4, *FAST, "--json")
    adapted = json.loads(call(*words, "--out", tmp_path / "a").stdout)
    assert (tmp_path / "a" / "model" / "adapter_model.safetensors").is_file()
    merged = json.loads(call(*words, "--merge", "--out", tmp_path / "m").stdout)
    assert merged["perplexity_after"] == adapted["perplexity_after"]
    ids = torch.arange(5, 60).unsqueeze(0)
    with torch.no_grad():
        one = open_model(str(tmp_path / "a" / "model"))(ids).logits
        two = open_model(str(tmp_path / "m" / "model"))(ids).logits
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_trained_further_but_takes_no_second_one(folder, tmp_path):
    pytest.importorskip("peft")
    words = (folder / "text.txt", *FAST, "--json")
    first = json.loads(call(folder / "llama", *words, "--lora", 4, "--out", tmp_path / "a").stdout)
    adapter = tmp_path / "a" / "model"
    second = json.loads(call(adapter, *words, "--out", tmp_path / "b").stdout)
    assert second["perplexity_before"] == pytest.approx(first["perplexity_after"], rel=1e-4)
    assert second["perplexity_after"] < second["perplexity_before"]
    words = map(str, (adapter, *words, "--lora", 4, "--out", tmp_path / "c"))
    refused = CliRunner().invoke(main, ["finetune", *words])
    assert "is an adapter; leave --lora out to train it further" in refused.output
    assert not (tmp_path / "c").exists()


def test_adapters_without_peft_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["no/model", "no/text", "--lora", "4", "--out", str(tmp_path / "r")]
    refused = CliRunner().invoke(main, ["finetune", *words])
    assert "--lora needs the package peft: pip install 'rlo-hf[peft]'" in refused.output
    assert not (tmp_path / "r").exists()


def test_a_real_model_and_text_run_offline(shared_data, tmp_path):
    result = call(
        shared_data / "stories260k",
        shared_data / "tinystories-sample",
        "--max-steps", 2, "--batch-size", 2, "--eval-tokens", 2048, "--no-save",
        "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    summary = json.loads(result.stdout)
    assert 3 < summary["perplexity_after"] < 8
    assert summary["linear_path"] == "fused"
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("no/such", "TEXT"), r"tokenizer 'no/such' could not be loaded .*give a local folder or"),
        (("x.gguf", "TEXT"), r"no GGUF file 'x\.gguf'"),
        (("MODEL", "wikitext2"), r"data set 'wikitext2' .*a local file or folder works without"),
        (("MODEL", "TEXT", "--loss", "rol"), r"unknown loss 'rol'; did you mean 'rlo'\?"),
        (("MODEL", "TEXT", "--block", "999999"), r"which is less than one block of 999999"),
        (("MODEL", "TEXT", "--resume"), r"no run in '.*': run\.json is not there"),
    ],
)
def test_a_known_failure_is_one_line(folder, tmp_path, words, message):
    places = {"MODEL": str(folder / "llama"), "TEXT": str(folder / "text.txt")}
    arguments = [places.get(word, word) for word in words]
    result = CliRunner().invoke(main, ["finetune", *arguments, "--out", str(tmp_path / "r")])
    assert result.exit_code == 1
    assert re.search(message, result.output), result.output
    assert "Traceback" not in result.output


def test_a_gguf_model_is_finetuned_as_a_float_model(folder, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "llama")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens[-1] = "ab"  # in the place of a byte that the text does not have: a merge is needed
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # the format interleaves the halves of a head
            heads = value.unflatten(0, (config.num_attention_heads, 2, -1))
            value = heads.transpose(1, 2).reshape(value.shape)
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = torch.arange(5, 60).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(open_model(str(path))(ids).logits, model(ids).logits)
    words = (path, folder / "text.txt", *FAST, "--out", tmp_path / "run", "--json")
    summary = json.loads(call(*words).stdout)
    assert summary["perplexity_after"] < 0.5 * summary["perplexity_before"]
    again = open_model(str(tmp_path / "run" / "model"))
    assert again.config.model_type == "llama"
    assert not getattr(again, "is_quantized", False)


def test_adapters_are_trained_on_a_quantized_checkpoint(folder, tmp_path):
    pytest.importorskip("rlo_gptq")
    from rlo_gptq.cli.main import main as gptq

    words = ["quantize", folder / "llama", folder / "text.txt", "--wbits", 4, "--quant", "gptq"]
    words += ["--nsamples", 4, "--seqlen", 32, "--save", tmp_path / "packed"]
    result = CliRunner().invoke(gptq, list(map(str, words)))
    assert result.exit_code == 0, result.output
    words = (tmp_path / "packed", folder / "text.txt", *FAST, "--json")
    refused = CliRunner().invoke(main, ["finetune", *map(str, words), "--out", str(tmp_path / "r")])
    assert "is quantized, so its weights cannot be trained; train adapters on it" in refused.output
    assert not (tmp_path / "r").exists()
    summary = json.loads(call(*words, "--lora", 4, "--out", tmp_path / "run").stdout)
    assert summary["perplexity_after"] < 0.95 * summary["perplexity_before"]


def test_a_quantized_checkpoint_of_a_missing_package_is_named(tmp_path):
    config = {"quantization_config": {"quant_method": "rlo-none"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "rlo_gptq", None)
        with pytest.raises(ModelError, match=r"^rlo-none models need the package rlo-gptq: pip"):
            open_model(str(tmp_path))


def test_help_imports_no_torch(root):
    import subprocess
    import sys

    code = (
        "import sys; sys.argv = ['rlo-hf', 'finetune', '--help']\n"
        "from rlo_hf.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--eval-only" in done.stdout


def test_one_run_writes_into_a_folder_at_a_time(folder, tmp_path):
    """The second is told who the first is, and leaves the folder as it is."""
    out = tmp_path / "run"
    words = ["finetune", str(folder / "llama"), str(folder / "text.txt"), "--out", str(out), *FAST]
    with lock_folder(out):
        result = CliRunner().invoke(main, list(map(str, words)))
        assert sorted(path.name for path in out.iterdir()) == [".rlo.lock"]
    assert result.exit_code == 1
    pattern = rf"^Error: '.*run' is being written by process {os.getpid()} on .*; wait for it to e"
    assert re.search(pattern, result.output), result.output
    assert not out.exists()


def test_a_run_that_was_killed_leaves_its_folder_free(folder, tmp_path):
    out = tmp_path / "run"
    hold = "import os, sys; from rlo_core.runs.folder import lock_folder\n"
    hold += "with lock_folder(sys.argv[1]):\n    os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", hold, str(out)], check=False)
    assert (out / ".rlo.lock").exists()
    call(folder / "llama", folder / "text.txt", "--out", out, "--eval-only", "--eval-tokens", 64)
    assert read_run(out)["status"] == "done"
    assert not (out / ".rlo.lock").exists()
