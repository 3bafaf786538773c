import importlib.util
import json
import warnings

import pytest
import rlo_gptq
import torch
from click.testing import CliRunner
from rlo_gptq.checkpoint.validation import CheckpointError
from rlo_gptq.cli.main import main
from rlo_gptq.formats.export import check_exportable, export_checkpoint
from rlo_gptq.formats.gptq import FormatError, unpack_layer
from rlo_gptq.formats.import_gptq import _one_size as one_size
from rlo_gptq.formats.import_gptq import import_checkpoint
from rlo_gptq.models.layout import Layout
from rlo_gptq.models.shards import save_tensors
from rlo_gptq.settings import LayerSettings
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    PreTrainedTokenizerFast,
)

TOKENS = torch.arange(20)[None]
LAYER = "model.layers.1.mlp.up_proj"


def logits(folder):
    with torch.no_grad():
        return rlo_gptq.load(folder, dtype=torch.float32)(TOKENS).logits


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_gives_the_same_logits_in_transformers(
    make_checkpoint, tmp_path, bits, sym
):
    pytest.importorskip("compressed_tensors")
    ours = make_checkpoint(bits=bits, sym=sym, group_size=32)
    export_checkpoint(ours, tmp_path / "out", format="compressed-tensors")
    # With packed zero points transformers 5.23 only loads through its dequantizing path: its empty
    # model keeps them unpacked.
    options = {} if sym else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, **options
        )
    with torch.no_grad():
        found = theirs(TOKENS).logits
    assert torch.allclose(found, logits(ours), atol=1e-5)


@pytest.mark.parametrize(("sym", "version"), [(True, "gptq"), (False, "gptq_v2")])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_files_hold_the_same_weights(make_checkpoint, tmp_path, bits, sym, version):
    ours = make_checkpoint(bits=bits, sym=sym, group_size=32)
    exported = export_checkpoint(ours, tmp_path / "out", format="gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert exported.checkpoint_format == config["checkpoint_format"] == version
    assert exported.layers == 14
    stored = load_file(tmp_path / "out" / "model.safetensors")
    parts = {p: stored[f"{LAYER}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")}
    weight = unpack_layer(LAYER, parts, bits=bits, checkpoint_format=version).dequantize()
    module = rlo_gptq.load(ours).get_submodule(LAYER)
    assert torch.equal(weight, module.dequantize())
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_importing_what_was_exported_gives_the_same_logits(make_checkpoint, tmp_path, bits, sym):
    ours = make_checkpoint(bits=bits, sym=sym, group_size=32, skip=("down_proj",))
    export_checkpoint(ours, tmp_path / "gptq", format="gptq")
    imported = import_checkpoint(tmp_path / "gptq", tmp_path / "back")
    assert (imported.settings.bits, imported.settings.sym, imported.layers) == (bits, sym, 12)
    assert torch.equal(logits(tmp_path / "back"), logits(ours))


def test_layers_that_were_left_out_are_named_for_each_reader(make_checkpoint, tmp_path):
    export_checkpoint(make_checkpoint(skip=("down_proj",)), tmp_path / "out", format="gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert ["mlp.down_proj"] not in config["modules_in_block_to_quantize"]
    assert list(config["dynamic"]) == [
        r"-:^model\.layers\.0\.mlp\.down_proj$",
        r"-:^model\.layers\.1\.mlp\.down_proj$",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"incoherence": "hadamard"},
            "rotated or rescaled at run time cannot be exported; quantize with",
        ),
        ({"integer_zero": False}, "zeros must be integers to be exported, got 1.5; quantize with"),
        ({"hidden": 48}, "its output width must be a multiple of 32 for the GPTQ format, got 48"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_leaves_nothing(
    make_checkpoint, tmp_path, settings, message
):
    ours = make_checkpoint(**settings)
    with pytest.raises(FormatError, match=message):
        export_checkpoint(ours, tmp_path / "out", format="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_an_existing_folder_is_not_overwritten(make_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(FormatError, match="must be a new or empty folder; nothing is overwritten"):
        export_checkpoint(make_checkpoint(), tmp_path / "out", format="gptq")


def test_a_checkpoint_of_another_method_is_not_imported(make_checkpoint, tmp_path):
    with pytest.raises(FormatError, match="quant_method must be 'gptq', got 'rlo-gptq'"):
        import_checkpoint(make_checkpoint(), tmp_path / "out")


def test_an_act_order_checkpoint_is_imported_with_its_columns_permuted(make_checkpoint, tmp_path):
    """The columns of a group may be anywhere; the oracle is the format's own formula."""
    pytest.importorskip("compressed_tensors")
    export_checkpoint(make_checkpoint(group_size=32, sym=False), tmp_path / "gptq", format="gptq")
    file = tmp_path / "gptq" / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    shuffled = [name for name in tensors if name.endswith(".g_idx") and ".1." in name]
    for name in shuffled:
        groups = tensors[name]
        tensors[name] = groups[torch.randperm(len(groups), generator=generator)].contiguous()
    save_tensors(file, tensors)
    import_checkpoint(tmp_path / "gptq", tmp_path / "mine")
    model = rlo_gptq.load(tmp_path / "mine")
    x = torch.randn(3, 64, generator=generator)
    for layer in (LAYER, LAYER.replace(".1.", ".0.")):
        parts = {p: tensors[f"{layer}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")}
        expected = unpack_layer(layer, parts, bits=2, checkpoint_format="gptq_v2").dequantize()
        module = model.get_submodule(layer)
        assert torch.equal(module.dequantize(), expected)
        torch.testing.assert_close(module(x), x @ expected.T)
    again = export_checkpoint(tmp_path / "mine", tmp_path / "again", format="gptq")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert again.checkpoint_format == "gptq_v2"
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    config = json.loads((tmp_path / "again" / "quantize_config.json").read_text())
    assert config["desc_act"] is True
    with pytest.raises(FormatError, match="mlp.*groups must be runs of equal length"):
        export_checkpoint(tmp_path / "mine", tmp_path / "ct", format="compressed-tensors")


def test_a_row_as_wide_as_a_group_is_one_group_of_that_size():
    """OPT's widths of 768 and 3072 in groups of 768; of narrower rows nothing else can be said."""
    assert one_size({"q_proj": (-1, 768), "fc2": (768, 3072)}) == 768
    assert one_size({"q_proj": (-1, 512), "fc2": (768, 3072)}) == 768
    assert one_size({"q_proj": (-1, 768), "fc2": (-1, 3072)}) == -1
    with pytest.raises(FormatError, match=r"layers must share one group size, got \[-1, 128\]"):
        one_size({"q_proj": (-1, 768), "fc2": (128, 3072)})
    with pytest.raises(FormatError, match=r"layers must share one group size, got \[64, 128\]"):
        one_size({"q_proj": (64, 768), "fc2": (128, 3072)})


def test_layers_of_one_group_beside_layers_of_several_are_imported(make_checkpoint, tmp_path):
    ours = make_checkpoint(bits=3, group_size=64, intermediate=128)
    export_checkpoint(ours, tmp_path / "gptq", format="gptq")
    assert import_checkpoint(tmp_path / "gptq", tmp_path / "mine").settings.group_size == 64
    assert torch.equal(logits(tmp_path / "mine"), logits(ours))


def test_a_gptq_checkpoint_is_evaluated_without_the_tool_that_made_it(make_checkpoint, tmp_path):
    ours = make_checkpoint(bits=4)
    characters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(ours)
    export_checkpoint(ours, tmp_path / "gptq", format="gptq")
    text = tmp_path / "text.txt"
    text.write_text("a red ball went out of the house to see the sun " * 20)
    arguments = ["compare", str(ours), str(tmp_path / "gptq"), "--dataset", str(text), "--json"]
    result = CliRunner().invoke(main, [*arguments, "--context", "32", "--max-tokens", "200"])
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.stdout)
    assert second["perplexity"] == first["perplexity"]
    assert (second["bits"], second["method"]) == (4, "gptq")


def test_groups_of_different_lengths_are_refused_by_name(make_checkpoint, tmp_path):
    export_checkpoint(make_checkpoint(group_size=32), tmp_path / "gptq", format="gptq")
    file = tmp_path / "gptq" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.g_idx"][:5] = 1
    save_tensors(file, tensors)
    with pytest.raises(FormatError, match=f"{LAYER}.*groups must be runs of equal length"):
        import_checkpoint(tmp_path / "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_order_that_is_no_permutation_is_refused_by_name(make_checkpoint, tmp_path):
    export_checkpoint(make_checkpoint(group_size=32), tmp_path / "gptq", format="gptq")
    file = tmp_path / "gptq" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"].flip(0).contiguous()
    save_tensors(file, tensors)
    import_checkpoint(tmp_path / "gptq", tmp_path / "mine")
    tensors = load_file(tmp_path / "mine" / "model.safetensors")
    tensors[f"{LAYER}.order"][0] = 10**6
    save_tensors(tmp_path / "mine" / "model.safetensors", tensors)
    (tmp_path / "mine" / "digests.json").unlink()
    with pytest.raises(CheckpointError, match=f"tensor '{LAYER}.order' must hold each of 0..63"):
        rlo_gptq.load(tmp_path / "mine")


def test_the_command_exports_and_verifies_in_transformers(make_checkpoint, tmp_path):
    pytest.importorskip("compressed_tensors")
    ours = make_checkpoint(bits=3, group_size=32)
    arguments = ["export", str(ours), "--format", "compressed-tensors", "--json"]
    result = CliRunner().invoke(main, [*arguments, "--verify-with", "transformers"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["folder"] == str(tmp_path / "ours-compressed-tensors")
    assert document["verified"][0]["difference"] < 1e-5


def test_the_command_says_which_peer_is_missing(make_checkpoint, tmp_path):
    if importlib.util.find_spec("gptqmodel") is not None:
        pytest.skip("gptqmodel is installed")
    result = CliRunner().invoke(
        main, ["export", str(make_checkpoint()), "--verify-with", "gptqmodel"]
    )
    assert result.exit_code == 1
    assert "--verify-with gptqmodel needs gptqmodel for this format; pip install" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]  # asked before it is written


def test_the_command_imports(make_checkpoint, tmp_path):
    export_checkpoint(make_checkpoint(), tmp_path / "gptq", format="gptq")
    result = CliRunner().invoke(main, ["import", str(tmp_path / "gptq"), str(tmp_path / "back")])
    assert result.exit_code == 0
    assert result.stdout.startswith("14 layers at 2 bits, group size -1, symmetric: ")


def test_all_layers_that_do_not_fit_are_named_at_once_with_the_skip_that_helps():
    shapes = {
        f"model.layers.{block}.{name}": shape
        for block in range(2)
        for name, shape in {
            "self_attn.q_proj": (64, 64),
            "mlp.up_proj": (172, 64),
            "mlp.down_proj": (64, 172),
        }.items()
    }
    settings = LayerSettings(bits=4, integer_zero=True)
    layout = Layout("model.layers", 2, (("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"),) * 2)
    with pytest.raises(FormatError) as refused:
        check_exportable("gptq", settings, layout, shapes)
    assert str(refused.value).startswith("4 of 6 layers do not fit (up_proj, down_proj); first: ")
    assert str(refused.value).endswith(
        "all would be left out by --skip '*.up_proj' --skip '*.down_proj'"
    )
    few = {name: shape for name, shape in shapes.items() if "up_proj" in name}
    with pytest.raises(FormatError, match="none of the 2 layers fits"):
        check_exportable("gptq", settings, layout, few)
    fits = {name: shape for name, shape in shapes.items() if "q_proj" in name}
    check_exportable("gptq", settings, layout, fits)
