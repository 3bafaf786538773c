"""Embedding and head: quantized, tied ones stored once, sizes known before to the byte."""

from __future__ import annotations

import json
import shutil

import pytest
import rlo_gptq
import torch
import transformers
from rlo_core.errors import RLOError
from rlo_gptq.checkpoint.dense_outside import DenseOutside
from rlo_gptq.checkpoint.outside import outside_modules
from rlo_gptq.checkpoint.validation import CheckpointError
from rlo_gptq.evaluation.inspect_layers import inspect_model
from rlo_gptq.models.digests import DIGESTS
from rlo_gptq.models.fold import check_foldable
from rlo_gptq.models.outside import find_outside
from rlo_gptq.models.shards import file_bytes
from rlo_gptq.models.source import ModelSource
from rlo_gptq.models.stored_types import StoredTypes, write_stored_types
from rlo_gptq.options import Options
from rlo_gptq.packed.quant_embedding import QuantEmbedding
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.packed.tied_head import TiedHead
from rlo_gptq.pipeline.plan import discover
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.rounding.residual_rotation import residual_rotation
from rlo_gptq.settings import LayerSettings
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def quantize_to(quantize_to):
    """Quantize with the defaults of embedding and head."""

    def quantize(*arguments, **options):
        return quantize_to(*arguments, **{"embed_bits": None, "head_bits": None, **options})

    return quantize


@pytest.fixture(scope="session")
def quantized(model_folder, text_file, quantize_to, tmp_path_factory):
    """A small Llama at 3 bits with a packed embedding; not to be changed."""
    out = tmp_path_factory.mktemp("packed-embedding") / "model"
    layer = LayerSettings(bits=3, method="gptq", incoherence="hadamard", rescale=True)
    quantize_to(model_folder("llama-gqa-tied"), text_file, out, layer)
    return out


IDS = torch.arange(20)[None]
LAYER = LayerSettings(bits=4, method="gptq", incoherence="hadamard", rescale=True)
PLAIN = LayerSettings(bits=4, method="gptq", group_size=16, integer_zero=True)


def planned(model, layer, **options):
    """The plan as --dry-run makes it, on the model before anything is folded."""
    source = ModelSource(model)
    chosen = Options(str(model), "text", layer, nsamples=4, seqlen=32, **options)
    folded = None
    if options.get("rotate") and find_outside(source.model)[2]:
        folded = check_foldable(source.config.to_dict()).rotation
    plan = discover(source, chosen, folded=folded)
    source.close()
    return plan


@pytest.mark.parametrize("group_size", [-1, 7])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    "options", [{}, {"sym": False}, {"incoherence": "hadamard", "rescale": True}]
)
def test_rows_of_a_packed_embedding_are_those_of_its_dense_matrix(options, bits, group_size):
    settings = LayerSettings(bits=bits, method="nearest", group_size=group_size, **options)
    weight = torch.randn(13, 24)
    rounded = quantize_layer(weight, torch.eye(24), settings, seed=3)
    packed = QuantEmbedding(13, 24, settings, scale=2.0)
    packed.fill(rounded)
    ids = torch.tensor([[3, 3, 0], [12, 5, 7]])
    expected = 2 * rounded.dequantize()[ids]
    torch.testing.assert_close(packed(ids), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.to_embedding()(ids), expected, atol=1e-5, rtol=1e-5)
    half = packed.half()
    assert half(ids).dtype == torch.float16
    assert half.scales.dtype == torch.float16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LayerSettings(grid="trellis"), "grid must be 'scalar' for an embedding, got 'trellis'"),
        (
            LayerSettings(incoherence="hadamard", incoherence_sides="both"),
            "incoherence_sides must be 'in' for an embedding, got 'both'",
        ),
    ],
)
def test_an_embedding_whose_rows_cannot_be_read_alone_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantEmbedding(8, 8, settings)


@pytest.mark.parametrize("kind", ["hadamard", "mean"])
def test_a_folded_tied_head_computes_what_a_head_of_its_own_would(kind):
    """E diag(g) Q^T x from E Q^T, against the product written out in float64."""
    original, gain = torch.randn(9, 12).double(), torch.rand(12).double() + 0.5
    rotation = residual_rotation(kind, 12, 5)
    Q = rotation.apply(torch.eye(12).double()).T  # column i is Q e_i
    embedding = torch.nn.Embedding(9, 12)
    embedding.weight.data = (original @ Q.T).float()
    head = TiedHead(embedding, fold=kind)
    head.gain, head.seed = gain.float(), torch.tensor([5])
    x = torch.randn(2, 3, 12)
    expected = x.double() @ (original * gain @ Q.T).T
    torch.testing.assert_close(head(x).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        head.dequantize().double(), original * gain @ Q.T, atol=1e-4, rtol=1e-4
    )


CASES = [
    ("llama-gqa-tied", LAYER, {}),
    ("llama-gqa-tied", LAYER, {"embed_bits": 32}),
    ("llama-gqa-tied", LAYER, {"head_bits": 5}),
    ("llama-gqa-tied", PLAIN, {"rotate": "fold"}),
    ("llama-gqa-tied", PLAIN, {"rotate": "fold", "embed_bits": 16}),
    ("llama-gqa-tied", PLAIN, {"rotate": "fold", "embed_bits": 8, "head_bits": 3}),
    ("llama-gqa-tied", PLAIN, {"rotate": "fold", "embed_bits": 8, "head_bits": 32}),
    ("qwen2", LAYER, {}),
    ("qwen2", LAYER, {"embed_bits": 16, "head_bits": 6}),
    ("opt", PLAIN, {"rotate": "fold"}),
    ("gemma3", LayerSettings(bits=8, method="nearest"), {"embed_bits": 4}),
]


@pytest.mark.parametrize(("family", "layer", "options"), CASES)
def test_the_planned_size_is_that_of_the_file_to_the_byte(
    family, layer, options, model_folder, text_file, quantize_to, tmp_path
):
    model = model_folder(family)
    plan = planned(model, layer, **options)
    quantize_to(model, text_file, tmp_path / "q", layer, **options)
    file = tmp_path / "q" / "model.safetensors"
    assert plan.summary["checkpoint_bytes"] == file.stat().st_size
    parts = ("layer_bytes", "embedding_bytes", "head_bytes", "other_bytes")
    tensors = load_file(file)
    assert sum(plan.summary[name] for name in parts) == sum(
        t.numel() * t.element_size() for t in tensors.values()
    )
    inspected = inspect_model(str(tmp_path / "q"))
    assert inspected["file_bytes"] == file.stat().st_size
    assert inspected["packed_bytes"] + inspected["other_bytes"] == sum(
        t.numel() * t.element_size() for t in tensors.values()
    )
    reloaded = rlo_gptq.load(tmp_path / "q")
    dense = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        ours, theirs = reloaded(IDS).logits, dense(IDS).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 0.6


def test_shards_have_the_planned_sizes_too(
    model_folder, text_file, quantize_to, tmp_path, monkeypatch
):
    monkeypatch.setattr("rlo_gptq.models.shards.SINGLE_FILE_BYTES", 0)
    model = model_folder("llama-gqa-tied")
    plan = planned(model, LAYER)
    quantize_to(model, text_file, tmp_path / "q", LAYER)
    files = sorted((tmp_path / "q").glob("*.safetensors"))
    assert len(files) == 4  # rest, two blocks, the shared matrix
    assert plan.summary["checkpoint_bytes"] == sum(file.stat().st_size for file in files)


def test_a_tied_matrix_is_stored_once_and_read_by_both(
    model_folder, text_file, quantize_to, tmp_path
):
    quantize_to(model_folder("llama-gqa-tied"), text_file, tmp_path / "q", LAYER)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.int32
    assert not [name for name in tensors if name.startswith("lm_head")]
    model = rlo_gptq.load(tmp_path / "q")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(head, TiedHead)
    assert head.embedding is embedding
    x = torch.randn(3, 24)
    torch.testing.assert_close(head(x), x @ embedding.dequantize().T, atol=1e-4, rtol=1e-4)


def test_a_head_of_its_own_and_its_embedding_are_both_packed(
    model_folder, text_file, quantize_to, tmp_path
):
    result = quantize_to(model_folder("qwen2"), text_file, tmp_path / "q", LAYER)
    model = rlo_gptq.load(tmp_path / "q")
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    assert [record["layer"] for record in result.outside] == ["model.embed_tokens", "lm_head"]
    assert all(record["bits"] == 8 and record["proxy"] < 1e-3 for record in result.outside)


def test_the_heads_hessian_is_that_of_the_last_hidden_states(
    model_folder, text_file, quantize_to, tmp_path, monkeypatch
):
    seen = {}

    def noted(weight, hessian, settings, *, seed):
        seen["hessian"] = hessian.clone()
        return quantize_layer(weight, hessian, settings, seed=seed)

    monkeypatch.setattr("rlo_gptq.pipeline.outside.quantize_layer", noted)
    quantize_to(model_folder("qwen2"), text_file, tmp_path / "q", LAYER)
    model = rlo_gptq.load(tmp_path / "q")
    states = []
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: states.append(args[0]))
    from rlo_gptq.pipeline.blocks import load_calibration

    source = ModelSource(model_folder("qwen2"))
    options = Options(str(model_folder("qwen2")), str(text_file), LAYER, nsamples=4, seqlen=32)
    sequences, _ = load_calibration(options, source, 32)
    with torch.no_grad():
        for sequence in sequences:
            model(sequence[None])
    x = torch.cat([state.reshape(-1, 24) for state in states]).double()
    torch.testing.assert_close(seen["hessian"].double(), x.T @ x / len(x), atol=1e-3, rtol=1e-3)


def test_a_run_stopped_before_the_head_goes_on_to_the_same_bits(
    model_folder, text_file, quantize_to, tmp_path, monkeypatch
):
    model = model_folder("llama-gqa-tied")
    quantize_to(model, text_file, tmp_path / "whole", LAYER)
    with monkeypatch.context() as patch:
        patch.setattr("rlo_gptq.pipeline.outside.normalised", lambda h: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_to(model, text_file, tmp_path / "q", LAYER)
    assert not (tmp_path / "q" / "config.json").exists()
    result = quantize_to(model, text_file, tmp_path / "q", LAYER)
    assert result.resumed == 2
    names = ("model.safetensors", "config.json")
    for name in names:
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("family", "options"), [("llama-gqa-tied", {"rotate": "fold"}), ("qwen2", {})]
)
def test_for_other_formats_embeddings_and_heads_are_dense(
    family, options, model_folder, text_file, quantize_to, tmp_path
):
    """File by file, the folded head from an embedding that comes in another file."""
    quantize_to(model_folder(family), text_file, tmp_path / "q", PLAIN, **options)
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    stored = load_file(tmp_path / "q" / "model.safetensors")
    dense = DenseOutside(outside_modules(config["outside"]), torch.float32)
    of_embedding = {k: t for k, t in stored.items() if k.startswith("model.embed_tokens.")}
    others = {k: t for k, t in stored.items() if k not in of_embedding}
    tensors = {**dense.unpacked(others), **dense.unpacked(of_embedding)}
    model = rlo_gptq.load(tmp_path / "q")
    for name, module in (
        ("model.embed_tokens", model.get_input_embeddings()),
        ("lm_head", model.get_output_embeddings()),
    ):
        assert [key for key in tensors if key.startswith(f"{name}.")] == [f"{name}.weight"]
        torch.testing.assert_close(tensors[f"{name}.weight"], module.dequantize())


def test_a_model_that_came_narrow_is_stored_no_wider(
    model_folder, text_file, quantize_to, tmp_path
):
    model = shutil.copytree(model_folder("llama-gqa-tied"), tmp_path / "m")
    write_stored_types(model, StoredTypes("float16", 8))
    layer = LayerSettings(bits=8, method="nearest")
    skip = ("*.down_proj",)
    plan = planned(model, layer, skip=skip)
    quantize_to(model, text_file, tmp_path / "q", layer, skip=skip)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.float16
    assert tensors["model.norm.weight"].dtype == torch.float32
    assert tensors["model.embed_tokens.weight"].dtype == torch.int32
    assert plan.outside.embedding_settings.bits == 8
    size = (tmp_path / "q" / "model.safetensors").stat().st_size
    assert plan.summary["checkpoint_bytes"] == size


@pytest.mark.parametrize(
    ("came", "bits", "expected"), [(8, 8, 8), (6, 4, 6), (4, 2, 4), (2, 2, 4), (16, 8, None)]
)
def test_the_recommended_bits_are_no_more_than_what_came(came, bits, expected):
    from rlo_gptq.models.outside import recommended_bits

    found = recommended_bits(LayerSettings(bits=bits), StoredTypes("float16", came))
    assert found == expected


def test_compat_leaves_embedding_and_head(model_folder):
    layer = LayerSettings(bits=2, method="gptq", compat="quip", npasses=1)
    plan = planned(model_folder("qwen2"), layer)
    assert plan.outside.quantized == {}
    assert plan.summary["embedding"] == "as it came"


def test_a_tied_head_with_other_bits_than_its_embedding_is_refused(model_folder):
    with pytest.raises(RLOError, match="--head-bits must be 8, as --embed-bits, for a head that"):
        planned(model_folder("llama-gqa-tied"), LAYER, embed_bits=8, head_bits=4)


def test_the_plan_says_how_a_folded_head_is_stored(model_folder):
    plan = planned(model_folder("llama-gqa-tied"), PLAIN, rotate="fold")
    assert plan.summary["head"] == (
        "the embedding's matrix, the folded norm and rotation undone at run time, stored once"
    )
    assert plan.summary["embedding"] == "8 bits, groups of 16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o["lm_head"].update(kind="other"), "must be an embedding, a head or a tied"),
        (lambda o: o["lm_head"].update(fold="x"), "a known rotation or null"),
        (lambda o: o["lm_head"].update(embedding="model.norm"), "must be nn.Embedding, got"),
        (lambda o: o["model.embed_tokens"].update(columns=23), r"columns must be 24 .* got 23"),
        (lambda o: o["model.embed_tokens"]["settings"].update(bits=7), "bits must be one of"),
        (lambda o: o["model.embed_tokens"]["settings"].update(bits=4), "must have shape"),
        (lambda o: o.pop("model.embed_tokens"), "must have shape|must have type"),
    ],
)
def test_a_changed_entry_is_refused(change, message, quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "q", ignore=shutil.ignore_patterns(DIGESTS))
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["outside"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        rlo_gptq.load(folder)


def test_the_size_of_a_file_is_computed_without_its_data():
    from safetensors.torch import save

    tensors = {"b": torch.zeros(3, 5), "a": torch.zeros(7, dtype=torch.float16)}
    assert file_bytes({k: t.to("meta") for k, t in tensors.items()}) == len(
        save(tensors, metadata={"format": "pt"})
    )
