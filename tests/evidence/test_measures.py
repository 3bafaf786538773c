"""The pieces that a wrong number could come from."""

import math

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 1.0])
def test_symmetric_noise_changes_exactly_its_share_of_the_labels(share):
    from vision import with_noise

    labels = torch.arange(1000) % 10
    noisy = with_noise(labels, share, seed=3)
    assert int((noisy != labels).sum()) == round(1000 * share)
    assert torch.equal(noisy, with_noise(labels, share, seed=3))
    assert set(noisy.tolist()) <= set(range(10))


def test_augmentation_crops_and_flips_each_image_by_itself():
    """Oracle: the same crops and flips, one image at a time, with torch's own functions."""
    from torch.nn.functional import pad
    from vision import augment

    x = torch.randn(6, 3, 32, 32)
    got = augment(x, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    top, left = torch.randint(0, 9, (2, 6), generator=generator)
    flip = torch.rand(6, generator=generator) < 0.5
    assert flip.any()
    assert not flip.all()
    for i in range(6):
        crop = pad(x[i], (4, 4, 4, 4))[:, top[i] : top[i] + 32, left[i] : left[i] + 32]
        expected = crop.flip(-1) if flip[i] else crop
        assert torch.equal(got[i], expected)


@pytest.mark.parametrize("model", [("resnet18", {"width": 8, "stem_stride": 2}), ("vit", {})])
def test_the_networks_give_ten_logits_and_train(model):
    from vision_models import build

    logits = build(*model)(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    logits.sum().backward()


def test_the_full_width_network_is_resnet_18():
    from vision_models import resnet18

    # 11,173,962: ResNet-18 with a 3x3 stem and ten classes, the figure of the CIFAR literature.
    assert sum(p.numel() for p in resnet18().parameters()) == 11_173_962


def test_the_fixed_features_give_the_published_accuracy_of_the_network(shared_data):
    """91.48 % on the 5,000 images; its first 500 here, through the network's own last layer."""
    from safetensors.torch import load_file
    from vision import features_of, load_images

    x, y = load_images(shared_data / "cifar10", "test", 500)
    checkpoint = shared_data / "resnet-cifar10" / "resnet20.safetensors"
    weights = load_file(checkpoint)
    logits = features_of(x, checkpoint) @ weights["linear.weight"].T + weights["linear.bias"]
    assert (logits.argmax(1) == y).float().mean().item() == pytest.approx(0.915, abs=0.03)


def test_the_condition_number_is_that_of_the_hessian_by_differences():
    from regression import condition
    from rlo_core.linear_model import RootedLogisticRegression
    from rlo_core.linear_model.objective import Objective
    from rlo_core.linear_model.root import Root

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 3)), rng.integers(0, 2, 60)
    model = RootedLogisticRegression(k=2.0, C=0.5, max_iter=4, tol=0.0)
    with pytest.warns(match="stopped after"):
        model.fit(X, y)
    objective = Objective(
        X, y, classes=2, weight=None, root=Root(2.0), l2=1 / 30, fit_intercept=True
    )
    w = np.append(model.coef_[0], model.intercept_)
    step = 1e-5
    hessian = np.stack(
        [
            (objective.at(w + step * e).gradient - objective.at(w - step * e).gradient) / (2 * step)
            for e in np.eye(4)
        ]
    )
    found = condition(model, X, y)
    assert found["condition"] == pytest.approx(np.linalg.cond(hessian), rel=1e-4)
    assert found["negative"] == 0


def test_a_loss_that_shifts_every_seed_alike_is_a_sure_difference():
    from tables import difference

    assert difference([(1.0, 1.5), (2.0, 2.5), (3.0, 3.5)]) == "**+0.5 ± 0.0**"
    assert difference([(1.0, 2.0), (2.0, 1.0)]) == "+0.0 ± 1.0"
    assert difference([(1.0, 1.5), (2.0, 2.5)]) == "+0.5 ± 0.0"  # two seeds are not sure of it
    assert difference([(1.0, 1.5)]) == "+0.5"


def test_tables_replace_only_what_is_between_their_markers(monkeypatch):
    import tables

    monkeypatch.setitem(tables.TABLES, "vision-cost", lambda: "| a |\n| --- |\n| 1 |")
    text = "before\n<!-- table: vision-cost -->\nold\n<!-- end -->\nafter"
    filled = tables.fill(text)
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter")
    assert "| 1 |" in filled
    assert "old" not in filled
    assert tables.fill(filled) == filled


def test_a_quantized_copy_has_at_most_sixteen_values_a_row_at_4_bits(shared_data):
    """The real small model through the real rounding; the output layer is left alone."""
    import quantization
    from lm_training import load_model
    from rlo_gptq.settings import LayerSettings

    model = load_model(str(shared_data / "stories260k"), torch.device("cpu")).eval()
    sequences = torch.randint(3, 500, (4, 64))
    moments = quantization.hessians(model, sequences)
    assert set(moments) == set(quantization.linears(model))
    assert all(m.shape[0] == m.shape[1] for m in moments.values())
    copy, proxy = quantization.quantized(model, moments, LayerSettings(bits=4), 0)
    assert 0 < proxy < 0.02
    for name, module in quantization.linears(copy).items():
        levels = {len(row.unique()) for row in module.weight}
        assert max(levels) <= 16, name
    head = model.get_output_embeddings().weight
    assert torch.equal(copy.get_output_embeddings().weight, head)
    assert math.isfinite(copy(sequences).logits.sum().item())
