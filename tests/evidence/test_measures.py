"""The pieces that a wrong number could come from."""

import re

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


def test_the_document_shows_the_committed_results():
    import tables

    text = tables.DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", text)) == set(tables.TABLES)
    assert tables.fill(text) == text


@pytest.fixture
def claim(shared_data, evidence, tmp_path):
    """The shipped claim with little calibration and text."""
    from language import Job
    from quantization import Claim
    from runner import load_config

    config = load_config(evidence / "configs" / "quantization-cpu.yaml")
    config |= {"calibration_sequences": 4, "eval_tokens": 512}
    language = load_config(evidence / "configs" / config["language"])
    return Claim(config, Job(config["job"], language, tmp_path))


def test_calibration_text_is_of_what_was_trained_on_and_nothing_that_is_reported(claim, tmp_path):
    """The words of the held-out part begin nowhere in it, whatever share of the text it takes."""
    job = claim.job
    for count in (65536, None):
        claim.config["calibration_tokens"] = count
        text = claim.calibration(tmp_path).read_text()
        assert job.tokenizer.decode(job.text.train[1000:1100]) in text
        for part in (job.text.validation, job.text.test):
            assert job.tokenizer.decode(part[1000:1100]) not in text
    assert len(text) == pytest.approx(0.9 * 1_115_394, rel=0.02)  # of a file of 1.1 MB


def test_the_perplexity_afterwards_is_that_of_the_packed_checkpoint(claim, tmp_path):
    """At 8 bits little is lost; at 2 bits, by rounding to nearest, much is."""
    from rlo_gptq.settings import LayerSettings

    model = claim.job.model(0)
    before = claim.perplexity(model)
    model.save_pretrained(tmp_path / "model")
    claim.job.tokenizer.save_pretrained(tmp_path / "model")
    text = claim.calibration(tmp_path)
    after = {}
    for bits in (8, 2):
        settings = LayerSettings(bits=bits, method="nearest")
        after[bits], proxy = claim.quantize(
            tmp_path / "model", text, tmp_path / f"w{bits}", settings, seed=0
        )
        assert (tmp_path / f"w{bits}" / "run.json").is_file()
        assert 0 < proxy < 1
    assert after[8] == pytest.approx(before, rel=0.03)
    assert after[2] > 1.2 * before
