"""Adapters begin at the quantization error, are evaluated where they lie, and merge into codes."""

from __future__ import annotations

import json
import math

import pytest
import rlo_gptq
import torch
import transformers
from click.testing import CliRunner
from rlo_core.lm.models import ModelError, open_model
from rlo_gptq.adapters.loftq import AdapterError
from rlo_gptq.adapters.merge import packed_base, quantize_options, write_merged
from rlo_gptq.cli.main import main
from rlo_gptq.cli.merge import merge_adapter
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.settings import EndToEndSettings, LayerSettings, TuneSettings
from rlo_gptq.tuning.run import Tuning, run_tuning

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
IDS = torch.arange(2, 34)[None]
FAMILY = "llama-gqa-tied"


def adapted(folder, *, rank=4, **options):
    config = peft.LoraConfig(r=rank, target_modules="all-linear", **options)
    return peft.get_peft_model(rlo_gptq.load(folder), config)


def logits(model, ids=None):
    with torch.no_grad():
        return model.eval()(IDS if ids is None else ids).logits


@pytest.fixture
def trained(quantized, tmp_path):
    """The folder of an adapter that was trained for some steps."""
    torch.manual_seed(0)
    model = adapted(quantized)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(6):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapters_begin_as_the_best_correction_of_their_rank(quantized, model_folder):
    """Against the singular values of the error, computed here in float64."""
    model = adapted(quantized, rank=5, lora_alpha=20)
    left = rlo_gptq.loftq_init(model, model_folder(FAMILY))
    assert len(left) == 14
    original = transformers.AutoModelForCausalLM.from_pretrained(model_folder(FAMILY))
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        layer = model.get_base_model().get_submodule(name)
        weight = original.get_submodule(name).weight.detach().double()
        error = weight - layer.base_layer.dequantize().double()
        best = torch.linalg.svdvals(error)[5:].square().sum()
        rest = (error - layer.get_delta_weight("default").detach().double()).square().sum()
        assert float(rest) == pytest.approx(float(best), rel=1e-4)
        assert left[name] == pytest.approx(float(best / error.square().sum()), rel=1e-4)


def test_a_rank_as_large_as_the_matrix_gives_the_original_back(quantized, model_folder):
    model = adapted(quantized, rank=64)
    rlo_gptq.loftq_init(model, model_folder(FAMILY))
    original = transformers.AutoModelForCausalLM.from_pretrained(model_folder(FAMILY))
    torch.testing.assert_close(logits(model), logits(original), atol=2e-3, rtol=1e-3)


def test_the_beginning_is_nearer_to_the_original_than_the_packed_model(quantized, model_folder):
    original = logits(transformers.AutoModelForCausalLM.from_pretrained(model_folder(FAMILY)))
    model = adapted(quantized, rank=8)
    before = (logits(model) - original).square().sum()
    rlo_gptq.loftq_init(model, model_folder(FAMILY))
    assert (logits(model) - original).square().sum() < 0.8 * before


def test_folded_rotations_are_folded_into_the_original_too(
    model_folder, text_file, quantize_to, tmp_path
):
    layer = LayerSettings(bits=3, method="gptq")
    quantize_to(model_folder(FAMILY), text_file, tmp_path / "q", layer, rotate="fold", seed=3)
    left = rlo_gptq.loftq_init(adapted(tmp_path / "q", rank=8), model_folder(FAMILY))
    assert 0 < max(left.values()) < 1


def test_another_model_than_the_original_is_refused(quantized, model_folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder(FAMILY))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.std())
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match=r"is not what was quantized: the relative squared diff"):
        rlo_gptq.loftq_init(adapted(quantized), tmp_path / "other")


def test_an_original_of_another_shape_is_refused(quantized, model_folder):
    message = r"layer 'model.layers.0.self_attn.q_proj' of .* must have shape \(24, 24\), got"
    with pytest.raises(AdapterError, match=message):
        rlo_gptq.loftq_init(adapted(quantized), model_folder("phi"))


def test_a_model_without_adapters_is_refused(quantized, model_folder):
    message = "the model has no LoRA adapter 'default' on a packed layer"
    with pytest.raises(AdapterError, match=message):
        rlo_gptq.loftq_init(rlo_gptq.load(quantized), model_folder(FAMILY))


def test_the_merged_dense_model_computes_what_model_and_adapter_do(trained, tmp_path):
    write_merged(trained, tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(
        logits(dense), logits(open_model(str(trained))), atol=2e-4, rtol=1e-4
    )
    assert not any(isinstance(module, QuantLinear) for module in dense.modules())


def test_a_changed_adapter_is_merged_again(trained, tmp_path):
    write_merged(trained, tmp_path / "dense")
    first = (tmp_path / "dense" / "model-00000.safetensors").read_bytes()
    model = open_model(str(trained))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    model.save_pretrained(trained)
    write_merged(trained, tmp_path / "dense")
    assert (tmp_path / "dense" / "model-00000.safetensors").read_bytes() != first


def test_merging_gives_a_packed_model_and_tuning_brings_it_nearer(trained, text_file, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(packed_base(trained))
    text = tokenizer(text_file.read_text())["input_ids"]
    ids = torch.tensor(text[: len(text) // 32 * 32]).view(-1, 32)  # the text that it is tuned on
    exact = logits(open_model(str(trained)), ids)
    distance = {}
    for tune in (False, True):
        out = tmp_path / f"merged-{tune}"
        document = merge_adapter(
            trained, str(text_file), out, changes={"nsamples": 9, "seqlen": 32}, tune=tune
        )
        assert document["layers"] == 14
        assert document["mean_proxy"] < 0.1
        model = rlo_gptq.load(out)
        assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
        assert model.model.layers[0].mlp.up_proj.bits == 3
        distance[tune] = float((logits(model, ids) - exact).square().mean())
        assert not (tmp_path / f".merged-{tune}.merged").exists()
    assert distance[True] < distance[False]
    assert distance[False] < float(exact.var())


def test_merging_an_untrained_adapter_keeps_the_codes(quantized, text_file, tmp_path):
    adapted(quantized).save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", str(text_file), tmp_path / "m", changes={"nsamples": 4})
    before, after = rlo_gptq.load(quantized), rlo_gptq.load(tmp_path / "m")
    pairs = zip(before.modules(), after.modules(), strict=True)
    weights = [(a.dequantize(), b.dequantize()) for a, b in pairs if isinstance(a, QuantLinear)]
    errors = [float((a - b).square().sum() / a.square().sum()) for a, b in weights]
    # Rounding at 3 bits costs about 0.04 of a weight's energy; what is on a grid finds it again.
    assert max(errors) < 1e-2


def test_a_model_tuned_end_to_end_is_tuned_so_again_when_an_adapter_is_merged(
    quantized, model_folder, text_file, tmp_path
):
    """Towards the sum of the packed model and the adapter, which no checkpoint of ours holds."""
    settings = EndToEndSettings(
        steps=4, learning_rate=0.001, batch=2, nsamples=9, seqlen=32, top_k=16, evaluations=2
    )
    tuning = Tuning(quantized, str(text_file), settings, original=str(model_folder(FAMILY)))
    run_tuning(tuning, tmp_path / "tuned", progress=False)
    torch.manual_seed(0)
    model = adapted(tmp_path / "tuned")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(4):  # LoRA on a tuned model
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    kept = quantize_options(tmp_path / "tuned", "data", changes={}, tune=None)
    assert (kept.tune, kept.end_to_end) == (None, settings)
    assert quantize_options(tmp_path / "tuned", "data", changes={}, tune=False).end_to_end is None
    out = tmp_path / "m"
    document = merge_adapter(
        tmp_path / "adapter", str(text_file), out, changes={"nsamples": 9, "seqlen": 32}
    )
    tuned = document["end_to_end"]
    assert tuned["held_out_kl_after"] < tuned["held_out_kl_before"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "m", "tuned"]
    rlo_gptq.load(out)


def test_a_merge_keeps_the_options_of_the_quantization(
    model_folder, text_file, quantize_to, tmp_path
):
    layer = LayerSettings(bits=4, method="gptq", group_size=8)
    tune = TuneSettings(epochs=1, learning_rate=0.01)
    options = {"nsamples": 3, "seed": 5, "skip": ("*.down_proj",), "tune": tune}
    quantize_to(model_folder(FAMILY), text_file, tmp_path / "q", layer, **options)
    kept = quantize_options(
        tmp_path / "q", "data", changes={"seqlen": 16, "nsamples": None}, tune=None
    )
    assert (kept.layer, kept.nsamples, kept.seqlen, kept.seed) == (layer, 3, 16, 5)
    assert (kept.skip, kept.tune) == (("*.down_proj",), tune)
    assert quantize_options(tmp_path / "q", "data", changes={}, tune=False).tune is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no adapter_config.json"),
        ("{", "is not JSON"),
        ("[]", "does not name its base model"),
        ("{}", "does not name its base model"),
        ('{"base_model_name_or_path": "some/hub"}', "'some/hub', is not a folder"),
    ],
)
def test_an_adapter_without_a_packed_base_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises((AdapterError, ModelError), match=message):
        packed_base(tmp_path)


def test_an_adapter_of_an_ordinary_model_is_left_to_peft(model_folder, tmp_path):
    config = {"base_model_name_or_path": str(model_folder(FAMILY))}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    message = r"must be quantized by rlo-gptq, got None; merge others with peft's merge_and_unload"
    with pytest.raises(AdapterError, match=message):
        packed_base(tmp_path)


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_commands_merge_and_evaluate_an_adapter(trained, quantized, text_file, tmp_path):
    found = {}
    command = ("merge", trained, text_file, "--save", tmp_path / "m", "--nsamples", 4, "--json")
    result = run(*command, "--seqlen", 32)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layers"] == 14
    card = (tmp_path / "m" / "README.md").read_text()
    assert "`adapter` quantized with rlo-gptq" in card
    for name, where in (("base", quantized), ("adapter", trained), ("merged", tmp_path / "m")):
        result = run("eval", where, text_file, "--split", "train", "--max-tokens", 500, "--json")
        assert result.exit_code == 0, result.output
        found[name] = json.loads(result.stdout)["perplexity"]
    assert all(map(math.isfinite, found.values()))
    assert found["adapter"] != found["base"]
    words = ("eval", tmp_path / "m", text_file, "--original", "--split", "train", "--json")
    both = json.loads(run(*words, "--max-tokens", 500).stdout)
    assert both["original_perplexity"] == found["adapter"]
    rows = json.loads(run("compare", quantized, trained, tmp_path / "m", "--json").stdout)
    assert [row["method"] for row in rows] == ["gptq", "gptq + adapter", "gptq"]
    assert rows[1]["bytes"] > rows[0]["bytes"]


def test_a_known_failure_of_merge_is_one_line(tmp_path, text_file):
    (tmp_path / "a").mkdir()
    result = run("merge", tmp_path / "a", text_file, "--save", tmp_path / "m")
    assert result.exit_code == 1
    assert result.output.strip().endswith("has no adapter_config.json")


def test_a_merge_that_is_refused_leaves_no_dense_model_behind(trained, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run("merge", trained, "/no/such/text", "--save", tmp_path / "m")
    assert result.exit_code == 1
    assert "Error: no data set '/no/such/text'" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


hf = pytest.importorskip("rlo_hf.cli")


@pytest.fixture
def lines(text_file, tmp_path):
    """The same text in a folder with its end held out."""
    words = text_file.read_text().split()
    folder = tmp_path / "lines"
    folder.mkdir()
    (folder / "train.txt").write_text(" ".join(words[:-200]))
    (folder / "validation.txt").write_text(" ".join(words[-200:]))
    return folder


def finetune(*words):
    return CliRunner().invoke(hf.main, ["finetune", *map(str, words)])


FAST = ("--block", 32, "--batch-size", 4, "--lr", 3e-3, "--max-steps", 6, "--warmup", 1, "--json")


@pytest.mark.parametrize("bits", [2, 3])
def test_quantize_finetune_and_reload_by_command_line(bits, model_folder, lines, tmp_path):
    q, out = tmp_path / "q", tmp_path / "run"
    model = model_folder(FAMILY)
    words = ("quantize", model, lines, "--wbits", bits, "--incoh-processing", "--save", q)
    result = run(*words, "--nsamples", 4, "--seqlen", 32)
    assert result.exit_code == 0, result.output
    words = (q, lines, "--lora", 4, "--loss", "rlo:k=5", "--out", out, *FAST)
    result = finetune(*words, "--save", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["perplexity_after"] < made["perplexity_before"]
    again = finetune(
        tmp_path / "adapter",
        lines,
        "--eval-only",
        "--no-save",
        "--out",
        tmp_path / "e",
        "--json",
    )
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["perplexity_before"] == pytest.approx(
        made["perplexity_after"], rel=1e-6
    )


def test_finetuning_can_begin_at_the_quantization_error(quantized, model_folder, lines, tmp_path):
    words = (quantized, lines, "--lora", 4, "--out", tmp_path / "run", *FAST, "--no-save")
    begun = finetune(*words, "--lora-init", "loftq", "--original", model_folder(FAMILY))
    assert begun.exit_code == 0, begun.output
    options = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    assert options["lora_init"] == "loftq"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lora", 4, "--lora-init", "loftq"), "--lora-init loftq needs --lora and --original"),
        (("--lora-init", "loftq", "--original", "m"), "--lora-init loftq needs --lora and"),
        (("--lora", 4, "--original", "m"), "--original needs --lora-init loftq"),
        (("--lora", 4, "--merge"), "keep the adapter beside it or use the quantizer's merge"),
    ],
)
def test_what_a_quantized_model_cannot_do_is_refused(words, message, quantized, lines, tmp_path):
    result = finetune(quantized, lines, *words, "--out", tmp_path / "run", *FAST)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_an_ordinary_model_has_no_error_to_begin_at(model_folder, lines, tmp_path):
    words = ("--lora", 4, "--lora-init", "loftq", "--original", "m", "--out", tmp_path / "run")
    result = finetune(model_folder(FAMILY), lines, *words, *FAST)
    assert result.exit_code == 1
    assert "needs a model quantized by one of: rlo-gptq; " in result.output
    assert result.output.rstrip().endswith("is not quantized")
