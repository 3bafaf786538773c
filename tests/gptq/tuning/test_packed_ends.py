"""Packed embeddings and heads are tuned through their scales; the plan knows every byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import rlo_gptq
import torch
import transformers
from rlo_gptq.packed import tiles
from rlo_gptq.packed.quant_embedding import QuantEmbedding
from rlo_gptq.packed.quant_linear import QuantLinear
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.settings import EndToEndSettings, LayerSettings
from rlo_gptq.tuning import divergence as divergence_module
from rlo_gptq.tuning.divergence import divergence, known_part
from rlo_gptq.tuning.layers import TunedEmbedding, TunedLinear
from rlo_gptq.tuning.parameters import adam
from rlo_gptq.tuning.run import Tuning, run_tuning
from rlo_gptq.tuning.student import Student
from safetensors.torch import load_file

CPU = torch.device("cpu")
LAYER = LayerSettings(bits=2, method="gptq", incoherence="hadamard", rescale=True)
PLAIN = LayerSettings(bits=2, method="gptq")
SETTINGS = EndToEndSettings(
    steps=4, learning_rate=0.0005, batch=2, nsamples=9, seqlen=32, top_k=16, evaluations=2
)
KINDS = {
    "tied": ("llama-gqa-tied", LAYER, {}),
    "folded": ("llama-gqa-tied", PLAIN, {"rotate": "fold"}),
    "apart": ("qwen2", LAYER, {"embed_bits": 3, "head_bits": 4}),
    "scaled": ("gemma3", LAYER, {}),
    "unpacked": ("llama-gqa-tied", LAYER, {"embed_bits": 16}),
}


@pytest.fixture(scope="module")
def packed_as(model_folder, text_file, quantize_to, tmp_path_factory):
    """A function from a kind to the folders of the packed model and of the dense one."""
    made = {}

    def make(kind):
        if kind not in made:
            family, layer, options = KINDS[kind]
            out = tmp_path_factory.mktemp(kind) / "model"
            ends = {"embed_bits": None, "head_bits": None, **options}
            quantize_to(model_folder(family), text_file, out, layer, **ends)
            made[kind] = out
        return made[kind], model_folder(KINDS[kind][0])

    return make


GRIDS = [
    LAYER,
    replace(PLAIN, sym=False),
    replace(PLAIN, group_size=7),
    replace(LAYER, bits=5, sym=False, group_size=10),
    replace(PLAIN, group_size=0),
]


@pytest.mark.parametrize("settings", GRIDS, ids=lambda s: f"{s.bits}-{s.group_size}-{s.sym}")
def test_products_in_tiles_have_the_gradients_of_the_dense_matrix(settings, monkeypatch):
    rounded = quantize_layer(torch.randn(50, 24), torch.eye(24), settings, seed=3)
    tuned = TunedLinear(QuantLinear.from_layer(rounded, settings), "layer")
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 24 * 7)
    wanted = [tuned.scales, *(t for t in (tuned.zeros, tuned.input_scale) if t is not None)]
    found = []
    for unpack in (False, True):
        if unpack:
            tuned.unpack()
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = tuned(x)
        weight = torch.linspace(-1, 2, y.numel()).view_as(y)
        found.append([y, *torch.autograd.grad((y * weight).sum(), [x, *wanted])])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [s for s in GRIDS if s.group_size],
    ids=lambda s: f"{s.bits}-{s.group_size}-{s.sym}",
)
def test_a_tuned_embedding_looks_up_what_the_packed_one_does(settings):
    rounded = quantize_layer(torch.randn(13, 24), torch.eye(24), settings, seed=3)
    packed = QuantEmbedding(13, 24, settings, scale=2.0).fill(rounded)
    tuned = TunedEmbedding(packed, "embedding")
    ids = torch.tensor([[3, 3, 0], [12, 5, 7]])
    torch.testing.assert_close(tuned(ids), packed(ids))
    weight = torch.randn(2, 3, 24)
    (slope,) = torch.autograd.grad((tuned(ids) * weight).sum(), tuned.scales)
    step = 1e-2 * torch.randn(tuned.scales.shape)
    with torch.no_grad():  # linear in the scales
        before = (tuned(ids) * weight).sum()
        tuned.scales += step
        after = (tuned(ids) * weight).sum()
    assert float(after - before) == pytest.approx(float((slope * step).sum()), rel=1e-2, abs=1e-4)
    assert bool((slope[[1, 2]] == 0).all())


@pytest.mark.parametrize("kind", ["tied", "folded", "apart", "scaled"])
def test_the_gradients_of_packed_ends_are_those_of_a_dense_copy(kind, packed_as, monkeypatch):
    """Through transformers' own forward with dense matrices that are functions of the scales."""
    folder, original = packed_as(kind)
    monkeypatch.setattr(divergence_module, "LOGITS", 259 * 20)  # a sequence in two parts
    student = Student(folder, "model.layers", CPU, embeddings=True)
    ids = [torch.arange(5, 37), torch.arange(60, 92)]
    dense = transformers.AutoModelForCausalLM.from_pretrained(original)
    with torch.no_grad():
        targets = [known_part(dense(i[None]).logits[0], i.roll(-1), 16) for i in ids]
    total = student.gradients(ids, targets, [torch.full((32,), 1 / 64)] * 2)
    model = rlo_gptq.load(folder)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted, of_embedding = {}, None

    def matrix(name, packed):
        scales = wanted[f"{name}.scales"] = packed.scales.float().requires_grad_()
        unit = (packed.dequantize() / packed.scales.float()).nan_to_num()  # the padding row is 0
        values = unit * scales  # one scale a row
        if packed.input_scale is not None:
            extra = wanted[f"{name}.input_scale"] = packed.input_scale.clone().requires_grad_()
            values = values / packed.input_scale * extra
        return values

    of_embedding = matrix("model.embed_tokens", table)
    if kind == "apart":
        of_head = matrix("lm_head", head)
    elif kind == "folded":
        gain = wanted["lm_head.gain"] = head.gain.clone().requires_grad_()
        of_head = head.turned(of_embedding, gain)
    else:
        of_head = of_embedding
    plain = torch.nn.Embedding(259, 24), torch.nn.Linear(24, 259, bias=False)
    scale = getattr(table, "scale", 1.0)
    model.model.embed_tokens, model.lm_head = plain
    given = {"model.embed_tokens.weight": of_embedding * scale, "lm_head.weight": of_head}
    losses = []
    for i, target in zip(ids, targets, strict=True):
        logits = torch.func.functional_call(model, given, (i[None],), tie_weights=False).logits[0]
        losses.append(divergence(logits, target).sum() / 64)
    loss = sum(losses)
    loss.backward()
    assert float(total) == pytest.approx(float(loss.detach()), rel=1e-4)
    found = {part.name: part.parameter.grad for part in student.trained}
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor.grad, atol=2e-6, rtol=5e-3, msg=name)


@pytest.mark.parametrize("kind", ["tied", "folded", pytest.param("apart", marks=pytest.mark.slow)])
def test_packed_ends_are_tuned_and_their_codes_stay(kind, packed_as, text_file, tmp_path):
    folder, original = packed_as(kind)
    tuning = Tuning(folder, str(text_file), SETTINGS, original=str(original))
    summary = run_tuning(tuning, tmp_path / "q", progress=False)
    assert summary["held_out_kl_after"] < summary["held_out_kl_before"]
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "q"))
    assert before.keys() == after.keys()
    ends = [n for n in before if n.startswith(("model.embed_tokens.", "lm_head."))]
    assert ends
    for name in ends:
        same = torch.equal(before[name], after[name])
        assert same == name.endswith((".weight", ".seed")), name
        assert before[name].dtype == after[name].dtype
    rlo_gptq.load(tmp_path / "q")


def test_packed_ends_can_be_left_alone(packed_as):
    for kind in ("tied", "apart"):
        student = Student(packed_as(kind)[0], "model.layers", CPU, embeddings=False)
        names = [part.name for part in student.trained]
        assert not [n for n in names if "embed_tokens" in n or "lm_head" in n]
        assert "model.layers.0.mlp.up_proj.scales" in names


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_of_packed_model_and_trained_tensors_is_exact(kind, packed_as, text_file):
    folder, original = packed_as(kind)
    tuning = Tuning(folder, str(text_file), SETTINGS, original=str(original))
    source = tuning.source(CPU)
    plan = tuning.plan(source)
    source.close()
    student = Student(folder, "model.layers", CPU, embeddings=True)
    assert plan["trained_numbers"] == sum(part.numbers for part in student.trained)
    loaded = rlo_gptq.load(folder, dtype=torch.float32)
    kept = {id(t): t for t in (*loaded.parameters(), *loaded.buffers())}.values()
    assert plan["packed_bytes"] == sum(tensor.nbytes for tensor in kept)
    own = {id(parameter) for parameter in loaded.parameters()}
    assert own  # norms
    names = {name for name, _ in loaded.named_parameters()}
    optimizer = adam(student.trained, 1e-3)
    for part in student.trained:
        part.take_gradient()
    optimizer.step()
    taken = 0
    for part in student.trained:
        moments = [v for v in optimizer.state[part.theta].values() if v.ndim or v.numel() > 1]
        taken += part.theta.nbytes + part.theta.grad.nbytes + sum(v.nbytes for v in moments)
        taken += 0 if part.start is None else part.start.nbytes
        taken += 0 if part.name in names else part.parameter.nbytes
    assert plan["trained_bytes"] == taken
