"""The loss that train.py's step sees is core's, computed by hand in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from rlo_core.errors import RLOError
from rlo_core.launch import ScriptError
from rlo_core.registry import create_loss
from torch import Tensor

Train = Callable[..., dict[str, Any]]
K, M = 8.0, 10.0
SPEC = ("--loss", f"rlo:k={K:g},m={M:g}")


def rooted(ce: Tensor, k: float = K, m: float = M) -> Tensor:
    """The definition, without expm1: float64 has the digits."""
    return m * (1.0 - torch.exp(-ce / k))


def expected(output: Tensor, q: Tensor, k: float = K, m: float = M) -> Tensor:
    """The expected loss of soft targets q."""
    return (q * rooted(-torch.log_softmax(output.double(), -1), k, m)).sum(-1).mean()


def one_hot(target: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    hot = F.one_hot(target, classes).double()
    return hot * (1.0 - smoothing) + smoothing / classes


def binary(output: Tensor, q: Tensor, pos_weight: float = 1.0) -> Tensor:
    """The rooted loss of each logit, (N, C)."""
    p = torch.sigmoid(output.double())
    positive, negative = M * (1.0 - p ** (1 / K)), M * (1.0 - (1.0 - p) ** (1 / K))
    return q * pos_weight * positive + (1.0 - q) * negative


def check(seen: dict[str, Any], value: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert seen["steps"]
    for step in seen["steps"]:
        torch.testing.assert_close(
            step["loss"].double(), value(step["output"], step["target"]), rtol=2e-6, atol=2e-6
        )
    after = seen["validation"]
    assert float(after["loss"]) == float(F.cross_entropy(after["output"], after["target"]))


def test_index_targets(train: Train, shape: str) -> None:
    seen = train(*SPEC, "--smoothing", "0", shape=shape)
    check(seen, lambda z, y: expected(z, one_hot(y, 5)))


def test_smoothed_targets(train: Train, shape: str) -> None:
    seen = train(*SPEC, "--smoothing", "0.3", shape=shape)
    check(seen, lambda z, y: expected(z, one_hot(y, 5, 0.3)))


def test_soft_targets_of_mixup(train: Train, shape: str) -> None:
    seen = train(*SPEC, "--mixup", "0.8", "--cutmix", "1.0", shape=shape)
    assert seen["steps"][0]["target"].shape == (4, 5)
    check(seen, lambda z, q: expected(z, q.double()))


def test_the_clean_split_of_the_jensen_shannon_loss(train: Train, shape: str) -> None:
    seen = train(*SPEC, "--jsd-loss", "--aug-splits", "3", shape=shape)

    def value(z: Tensor, y: Tensor) -> Tensor:
        clean = expected(z[:4], one_hot(y[:4], 5, 0.1))
        p = torch.softmax(z.double(), -1).view(3, 4, 5)
        mixture = p.mean(0).clamp(1e-7, 1).log()
        divergence = sum((part * (part.log() - mixture)).sum() / 4 for part in p) / 3
        return clean + 12 * divergence

    check(seen, value)


BINARY_SHAPES = pytest.mark.parametrize("shape", ["v0.5", "v1.0.28", "v1.0.31"])


@BINARY_SHAPES
def test_binary_targets_with_smoothing_and_positive_weight(train: Train, shape: str) -> None:
    seen = train(*SPEC, "--bce-loss", "--bce-pos-weight", "2.5", shape=shape)
    check(seen, lambda z, y: binary(z, one_hot(y, 5, 0.1), 2.5).mean())


@BINARY_SHAPES
def test_binary_targets_summed_over_classes_and_thresholded(train: Train, shape: str) -> None:
    argv = ("--bce-loss", "--bce-sum", "--bce-target-thresh", "0.2", "--mixup", "0.8")
    seen = train(*SPEC, *argv, shape=shape)
    check(seen, lambda z, q: binary(z, (q > 0.2).double()).sum(-1).mean())


@pytest.mark.parametrize("shape", ["v1.0.23", "v1.0.28", "v1.0.31"])
def test_the_task_loss_of_a_distillation(train: Train, shape: str) -> None:
    argv = ("--kd-model-name", "test_vit", "--task-loss-weight", "0.7")
    seen = train(*SPEC, *argv, "--distill-loss-weight", "0.0", shape=shape)
    check(seen, lambda z, y: 0.7 * expected(z, one_hot(y, 5, 0.1)))


def test_mixed_precision_is_computed_in_float32(train: Train) -> None:
    seen = train(*SPEC, "--amp")
    assert seen["steps"][0]["output"].dtype == torch.bfloat16
    assert seen["steps"][0]["loss"].dtype == torch.float32
    check(seen, lambda z, y: expected(z, one_hot(y, 5, 0.1)))


@pytest.mark.parametrize(
    ("spec", "link"),
    [
        ("rlo-convex:k=2", lambda ce: 2 * (torch.exp(ce / 2) - 1)),
        ("focal:gamma=2", lambda ce: 0.25 * (1 - torch.exp(-ce)) ** 2 * ce),
        ("ce", lambda ce: ce),
    ],
)
def test_any_registered_loss(train: Train, spec: str, link: Callable[[Tensor], Tensor]) -> None:
    seen = train("--loss", spec, "--smoothing", "0")
    check(
        seen,
        lambda z, y: link(F.cross_entropy(z.double(), y, reduction="none")).mean(),
    )


def test_without_a_loss_the_run_is_bit_identical(train: Train, shape: str) -> None:
    plain, launched = train(shape=shape, launched=False), train(shape=shape)
    assert plain["args"] == launched["args"]
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, launched["weights"][name]), name


def test_the_spec_comes_from_yaml_and_goes_to_args_yaml_in_one_form(
    train: Train, shape: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("loss: 'rlo: m=10, k=8'\nloss_schedule: linear:warmup=0.5\n")
    first = train("-c", str(tmp_path / "c.yaml"), "--epochs", "2", shape=shape)
    saved = yaml.safe_load(first["args"])
    own = shape == "v1.0.31"
    assert saved["rlo_loss" if own else "loss"] == "rlo:m=10,k=8"
    assert not own or saved["loss"] is None
    (tmp_path / "again.yaml").write_text(first["args"])
    again = train("-c", str(tmp_path / "again.yaml"), shape=shape)
    assert [float(s["loss"]) for s in first["steps"]] == [float(s["loss"]) for s in again["steps"]]
    assert first["args"] == again["args"]


def test_a_schedule_follows_the_scripts_progress_and_a_resumed_run_goes_on(
    train: Train, shape: str, tmp_path: Path
) -> None:
    argv = (*SPEC, "--loss-schedule", "linear:warmup=0.75", "--epochs", "4", "--smoothing", "0")
    whole = train(*argv, shape=shape)

    def at(step: int) -> tuple[float, float]:
        done = min(1.0, step / 8 / 0.75)
        k = math.inf if done == 0 else K / done
        return k, k * (1 + (M / K - 1) * done)

    for i, step in enumerate(whole["steps"]):
        k, m = at(i)
        ce = F.cross_entropy(step["output"].double(), step["target"], reduction="none")
        value = ce.mean() if math.isinf(k) else rooted(ce, k, m).mean()
        torch.testing.assert_close(step["loss"].double(), value, rtol=2e-6, atol=2e-6)
    resumed = train(
        *argv, "--resume", str(tmp_path / "last.pth.tar"), "--start-epoch", "3", shape=shape
    )
    step, _ = resumed["steps"]
    ce = F.cross_entropy(step["output"].double(), step["target"], reduction="none")
    torch.testing.assert_close(
        step["loss"].double(), rooted(ce, *at(6)).mean(), rtol=2e-6, atol=2e-6
    )


def test_resuming_under_another_loss_warns(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train("--loss", "rlo:k=3", "--epochs", "1")
    resume = str(tmp_path / "last.pth.tar")
    train("--loss", "rlo:k=3", "--resume", resume, "--epochs", "2")
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    train("--loss", "rlo:k=5", "--resume", resume, "--epochs", "3")
    assert f"{resume} was trained with loss 'rlo:k=3'; it goes on with 'rlo:k=5'" in caplog.messages


@pytest.mark.parametrize("name", ["ce", "focal", "root", "ROOT:k=3"])
def test_the_authors_names_of_losses_are_known(train: Train, name: str) -> None:
    seen = train("--loss", name)
    spec = name.lower().replace("root", "rlo")
    assert f"\nloss: {spec}\n" in seen["args"]


NEWEST = "v1.0.31"


def test_a_validated_yaml_file_takes_our_loss(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"loss: {SPEC[1]}\nsmoothing: 0.2\nloss_schedule: linear:warmup=0\n")
    seen = train("-c", str(config), shape=NEWEST)
    check(seen, lambda z, y: expected(z, one_hot(y, 5, 0.2)))
    for line, message in (
        ("loss: rol", "loss: invalid choice 'rol'"),
        ("los: rlo", "unknown argument 'los' in "),
        ("loss: rlo:k=-1", "argument --rlo-loss: "),
    ):
        config.write_text(line + "\n")
        with pytest.raises(SystemExit):
            train("-c", str(config), shape=NEWEST)
        assert message in capsys.readouterr().err


def test_multi_label_targets_take_the_binary_form_with_class_weights(train: Train) -> None:
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]).double()
    argv = ("--task", "multilabel", "--smoothing", "0.1")
    argv += ("--class-weight", *[f"{w:g}" for w in weight.tolist()])
    seen = train(*SPEC, *argv, shape=NEWEST)
    check(seen, lambda z, q: (weight * binary(z, q.double() * 0.9 + 0.05)).mean())


def test_resume_auto_compares_with_the_run_it_goes_on_with(
    train: Train, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    train("--loss", "rlo:k=3", "--resume", "auto", shape=NEWEST)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    train("--loss", "rlo:k=5", "--resume", "auto", "--epochs", "2", shape=NEWEST)
    resumed = tmp_path / "last.pth.tar"
    assert (
        f"{resumed} was trained with loss 'rlo:k=3'; it goes on with 'rlo:k=5'" in caplog.messages
    )


@pytest.mark.parametrize("shape", ["v0.5", "v1.0.28", NEWEST])
def test_the_check_prints_slot_criterion_and_weights_and_stops(
    train: Train, tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(*SPEC, "--smoothing", "0", "--rlo-check", shape=shape)
    assert stopped.value.code == 0
    assert not (tmp_path / "seen.pt").exists()
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("rlo-check: ")]
    anchor = "after `task" if shape == NEWEST else "before `validate_loss_fn"
    assert lines[0].startswith(f"rlo-check: slot: {anchor} = ...` in main(), line ")
    assert lines[1].endswith("in place of CrossEntropyLoss")
    assert "rlo:k=8,m=10" in lines[1]
    assert lines[2] == "rlo-check: batch: logits (4, 5) float32, targets (4,) int64"


def test_the_weights_of_the_check_are_the_slopes_of_the_link() -> None:
    from rlo_timm.launcher.check import report

    logits, target = torch.randn(3, 5), torch.tensor([0, 3, 1])
    ours = create_loss(SPEC[1])
    text = report(ours, ours.forward, torch.nn.CrossEntropyLoss(), "rlo", "here", logits, target)
    ce = F.cross_entropy(logits.double(), target, reduction="none")
    slopes = (M / K * torch.exp(-ce / K)).tolist()
    shown = text.splitlines()[4].removeprefix("rlo-check: sample weights: ").split()
    assert [float(x) for x in shown] == pytest.approx(slopes, rel=1e-3)


def test_the_check_needs_a_loss(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train("--rlo-check")
    assert "argument --rlo-check: needs --loss" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("shape", ["v0.5", "v1.0.23", "v1.0.28"])
def test_a_compiled_run_sees_the_same_loss(train: Train, shape: str) -> None:
    argv = (*SPEC, "--smoothing", "0", "--loss-schedule", "linear:warmup=1", "--epochs", "8")
    eager = train(*argv, shape=shape)
    compiled = train(*argv, "--torchcompile", "eager", shape=shape)
    for a, b in zip(eager["steps"], compiled["steps"], strict=True):
        torch.testing.assert_close(a["loss"], b["loss"])


def test_prefixes_of_the_scripts_options_keep_their_meaning(train: Train) -> None:
    assert yaml.safe_load(train("--lo", "7", *SPEC)["args"])["log_interval"] == 7


def test_our_options_have_no_prefixes(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        train("--los", "rlo")
    assert exit_.value.code == 2
    assert "unrecognized arguments: --los rlo" in capsys.readouterr().err


def test_help_lists_our_options_in_a_group_of_their_own(
    train: Train, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        train("--help", shape=shape)
    assert exit_.value.code == 0
    text = capsys.readouterr().out.partition("Rooted logistic objectives (rlo-timm):")[2]
    assert ("--rlo-loss SPEC" if shape == "v1.0.31" else "--loss SPEC") in text
    assert "--loss-schedule SHAPE" in text


@pytest.mark.parametrize("source", ["flag", "yaml"])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rol", "unknown loss 'rol'; did you mean 'rlo'? available: "),
        ("rlo:j=1", "loss 'rlo' takes no option 'j'; it takes k, m"),
        ("rlo:k=-1", "loss 'rlo:k=-1': k must be positive, got -1"),
        ("rlo:k", "loss spec must be NAME or NAME:option=value,..., got 'rlo:k'"),
    ],
)
def test_a_bad_spec_is_refused_before_the_model_is_made(
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    spec: str,
    message: str,
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"loss": spec}))
    argv = ("--loss", spec) if source == "flag" else ("-c", str(tmp_path / "c.yaml"))
    with pytest.raises(SystemExit) as exit_:
        train("--model", "there_is_no_such_model", *argv)
    assert exit_.value.code == 2
    assert f"error: argument --loss: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--loss-schedule", "linear"), "argument --loss-schedule: needs --loss"),
        (
            ("--loss", "rlo", "--loss-schedule", "square"),
            "schedule must be one of constant, linear, cosine, geometric, got 'square'",
        ),
        (
            ("--loss", "rlo", "--loss-schedule", "linear:k=3"),
            "schedule takes warmup and k_start, got 'k'",
        ),
        (
            ("--loss", "focal", "--loss-schedule", "linear"),
            "loss 'focal' takes no option 'schedule'; it takes gamma, alpha",
        ),
    ],
)
def test_a_bad_schedule_is_refused(
    train: Train, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        train(*argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_scripts_own_loss_option_still_works_and_takes_ours_too(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "v1.0.31"
    plain = train("--loss", "poly", shape=shape, launched=False)
    launched = train("--loss", "poly", shape=shape)
    assert plain["args"] == launched["args"]
    assert all(torch.equal(plain["weights"][n], w) for n, w in launched["weights"].items())
    seen = train("--loss", "bce", "--rlo-loss", SPEC[1], shape=shape)
    check(seen, lambda z, y: binary(z, one_hot(y, 5, 0.1)).mean())
    with pytest.raises(SystemExit):
        train("--loss", "rol", shape=shape)
    assert "argument --loss: invalid choice: 'rol'" in capsys.readouterr().err


def test_a_criterion_of_another_kind_is_refused(train: Train) -> None:
    with pytest.raises(RLOError) as caught:
        train("--loss", "asl", "--rlo-loss", "rlo", shape="v1.0.31")
    assert str(caught.value) == (
        "loss 'rlo' cannot stand in for AsymmetricLossSingleLabel; it can for CrossEntropyLoss, "
        "LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, BinaryCrossEntropy and "
        "JsdCrossEntropy"
    )


def test_a_schedule_needs_loops_that_are_recognised(
    train: Train, write_script: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlo_core.launch import run_script
    from rlo_timm.launcher.train_script import transform

    path = write_script("v1.0.28")
    path.write_text(path.read_text().replace("for batch_idx, (input", "for index, (input"))
    with pytest.raises(ScriptError, match="this script's progress is not recognised: looked for"):
        run_script(path, ["--loss", "rlo", "--loss-schedule", "linear"], transform=transform)
