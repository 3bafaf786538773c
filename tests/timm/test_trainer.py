"""`rlo-timm train` end to end on scikit-learn's digits, and on real CIFAR-10 if it is at hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner, Result
from rlo_core.errors import RunError
from rlo_core.runs.record import read_metrics, read_run
from rlo_timm.cli import main
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

SMALL = ["--dataset", "digits", "--net", "test_resnet", "-b", "16", "--device", "cpu"]
SMALL += ["--workers", "0", "--lr", "1e-3"]
SMALL += ["--train-limit", "32", "--val-limit", "20"]

Train = Callable[..., Result]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["train", *argv])
        assert result.exit_code == code, result.output
        return result

    yield run  # type: ignore[misc]
    torch.use_deterministic_algorithms(False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def values(folder: Path, name: str, split: str = "val") -> list[float]:
    return [r[name] for r in read_metrics(folder) if r["split"] == split]


def test_without_options_the_run_is_the_authors(train: Train) -> None:
    config = yaml.safe_load(train("--print-config").output)
    assert (config["dataset"], config["net"], config["epochs"]) == ("cifar10", "vit", 200)
    assert (config["batch_size"], config["opt"], config["scheduler"]) == (512, "adam", "cosine")
    from rlo_timm.trainer.nets import learning_rate
    from rlo_timm.trainer.settings import TrainSettings

    assert str(TrainSettings().spec()) == "rlo:k=3,m=3"
    assert (learning_rate("vit"), learning_rate("res18")) == (1e-4, 1e-3)
    assert str(TrainSettings(loss="root", k=8, m=10).spec()) == "rlo:k=8,m=10"
    assert str(TrainSettings(loss="ce").spec()) == "ce"


def test_a_run_writes_everything_and_its_numbers_agree(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(*SMALL, "--k", "8", "--m", "10", "--epochs", "2", "--seed", "3", "-o", str(out))
    assert "report.html" in result.output
    for name in (
        "run.json",
        "metrics.jsonl",
        "config.yaml",
        "report.html",
        "metrics.csv",
        "config.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "model.safetensors",
    ):
        assert (out / name).is_file(), name
    assert list((out / "tensorboard").glob("events.*"))
    document = read_run(out)
    assert document["loss"] == "rlo:k=8,m=10"
    assert document["seed"] == 3
    assert document["status"] == "done"
    assert document["data"] | {"fingerprint": ""} == {
        "name": "digits",
        "train": 32,
        "val": 20,
        "classes": 10,
        "size": 32,
        "fingerprint": "",
    }
    # The measures, by hand, from the weights that were saved.
    from rlo_timm.trainer.data import load_data
    from rlo_timm.trainer.settings import TrainSettings

    net = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in weights(out).items())
    data = load_data(TrainSettings(dataset="digits", val_limit=20))
    samples = [data.val[i] for i in range(20)]
    images = torch.stack([pil_to_tensor(image) for image, _ in samples]) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        normal = (images - mean[:, None, None]) / std[:, None, None]
        logits = net.eval()(normal).double()
    labels = [label for _, label in samples]
    target = torch.tensor(labels)
    log_p = logits.log_softmax(-1)
    ce = -log_p.gather(1, target[:, None]).squeeze(1)
    best = document["summary"]["best_epoch"] - 1
    assert values(out, "ce")[best] == pytest.approx(float(ce.mean()), rel=1e-4)
    assert values(out, "loss")[best] == pytest.approx(
        float((10 * (1 - torch.exp(-ce / 8))).mean()), rel=1e-4
    )
    accuracy = float((logits.argmax(-1) == target).double().mean())
    assert values(out, "acc1")[best] == pytest.approx(accuracy)
    top5 = logits.topk(5).indices.eq(target[:, None]).any(1).double().mean()
    assert values(out, "acc5")[best] == pytest.approx(float(top5))
    confidence, right = log_p.exp().max(-1).values, logits.argmax(-1) == target
    bins = (confidence * 15).ceil().long() - 1
    gaps = [
        abs(float((right[bins == b].double() - confidence[bins == b]).sum())) for b in range(15)
    ]
    assert values(out, "ece")[best] == pytest.approx(sum(gaps) / 20, abs=1e-5)
    lr = values(out, "lr", "train")
    assert lr == pytest.approx([1e-3, 1e-3 * 0.5 * (1 + math.cos(math.pi / 2))])


def test_checkpoints_load_with_weights_only(train: Train, tmp_path: Path) -> None:
    train(*SMALL, "--epochs", "1", "-o", str(tmp_path / "run"), "--json")
    for name in ("best", "last"):
        path = tmp_path / "run" / "checkpoints" / f"{name}.ckpt"
        assert "state_dict" in torch.load(path, weights_only=True)


def test_json_is_one_document_on_stdout(train: Train, tmp_path: Path) -> None:
    result = train(*SMALL, "--epochs", "1", "-o", str(tmp_path / "run"), "--json")
    document = json.loads(result.stdout)
    assert document["loss"] == "rlo:k=3,m=3"
    assert document["epochs"] == 1


def test_a_seeded_run_is_the_same_twice_and_a_resumed_one_is_the_whole(
    train: Train, tmp_path: Path
) -> None:
    schedule = ("--loss-schedule", "linear", "--json")
    train(*SMALL, *schedule, "--epochs", "3", "--seed", "5", "-o", str(tmp_path / "a"))
    # Interrupted within the second epoch: what is on disk is one whole epoch.
    from rlo_timm.trainer import module

    original = module.Classifier.training_step

    def until_second(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 1 and batch_idx == 1:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Classifier, "training_step", until_second)
        # Without --seed one is drawn, here that of `a`; the resumed run finds it in run.json.
        patch.setattr("random.SystemRandom.randrange", lambda self, stop: 5)
        result = train(*SMALL, *schedule, "--epochs", "3", "-o", str(tmp_path / "b"), code=130)
    assert "interrupted" in result.output
    assert read_run(tmp_path / "b")["status"] == "interrupted"
    train("--resume", str(tmp_path / "b"), "--json")
    assert read_run(tmp_path / "b")["status"] == "done"
    a, b = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in "ab"
    )
    for name, value in a.items():
        if torch.is_tensor(value):
            assert torch.equal(value, b[name]), name
    assert values(tmp_path / "a", "ce") == values(tmp_path / "b", "ce")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--loss", "rol"), "unknown loss 'rol'; did you mean 'rlo'?"),
        (("--loss", "rlo:k=3", "--k", "4"), "option 'k' is given twice"),
        (("--net", "swim"), "unknown net 'swim'; did you mean 'swin'? there are vgg, res18"),
        (("--dataset", "cifra10"), "dataset must be one of cifar10, cifar100, tiny-imagenet"),
        (("--epochs", "0"), "epochs must be at least 1, got 0"),
        (("--scheduler", "stp"), "scheduler must be one of cosine, tanh, step, multistep, plateau"),
        (("--opt", "adamm"), "unknown opt 'adamm'; did you mean 'adam'? timm has "),
        (("--device", "foo"), "unknown device 'foo'; there are auto, gpu, cpu"),
        (("--device", "cuda"), "device 'cuda' is not available on this machine"),
        (("--precision", "bf17"), "unknown precision 'bf17'; did you mean 'bf16'? there are auto"),
        (("--strategy", "ddq"), "the trainer: You selected an invalid strategy name"),
        (("--net", "timm/resnet18"), "a model of the hub is written hf-hub:timm/resnet18"),
        (("--net", "vit", "--stem", "cifar"), "net 'vit' has one stem only; vgg, res18, res34"),
        (("--net", "test_vit.r160_in1k", "--pretrained"), "could not be fetched, is there a net"),
        (("--logger", "wandb"), "--logger wandb needs wandb: pip install 'rlo-timm[wandb]'"),
        (("--push", "me/model"), "to push to 'me/model', log in first: `hf auth login`"),
        (("--warmup-epochs", "300"), "warmup_epochs must be less than epochs (200), got 300"),
        (("--resume", "nowhere"), "no run in 'nowhere': run.json is not there"),
        (("--finetune-from", "nothing.ckpt"), "finetune_from must be a file of weights"),
        (("--config", "missing.yaml"), "'missing.yaml' is no YAML file"),
        (
            ("--dataset", "cifar10", "--no-download"),
            "cifar10 must be in 'data/cifar-10-batches-py', and it is not there; --download",
        ),
        (("--dataset", "imagenet"), "imagenet must be in 'data/imagenet', as train/WNID/*.JPEG"),
        (
            ("--dataset", "tiny-imagenet"),
            "tiny-imagenet must be unpacked in 'data/tiny-imagenet-200'",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    train: Train, argv: tuple[str, ...], message: str
) -> None:
    result = train(*SMALL, *argv, code=1)
    assert result.output.startswith("Error: ")
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not Path("runs").exists()


def test_options_come_from_yaml_and_flags_win(train: Train, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("net: swin\nbatch-size: 8\nlr: 1e-3\n")
    config = yaml.safe_load(train("-c", "c.yaml", "--net", "vit", "--print-config").output)
    assert (config["net"], config["batch_size"], config["lr"]) == ("vit", 8, 1e-3)
    (tmp_path / "bad.yaml").write_text("nte: swin\n")
    assert "bad.yaml has no option 'nte'; did you mean 'net'? there are dataset" in (
        train("-c", "bad.yaml", "--print-config", code=1).output
    )
    (tmp_path / "type.yaml").write_text("epochs: many\n")
    assert "type.yaml: epochs must be int, got 'many'" in (
        train("-c", "type.yaml", "--print-config", code=1).output
    )


def test_fast_dev_run_writes_nothing(train: Train, tmp_path: Path) -> None:
    train(*SMALL, "--fast-dev-run", "--json")
    assert not list(tmp_path.iterdir())


def test_finetuning_takes_the_body_and_leaves_another_head(train: Train, tmp_path: Path) -> None:
    from rlo_timm.trainer.nets import NetError, create_net

    train(*SMALL, "--epochs", "1", "-o", str(tmp_path / "run"), "--json")
    saved = weights(tmp_path / "run")
    source = str(tmp_path / "run")
    net = create_net("test_resnet", classes=7, size=32, finetune_from=source).state_dict()
    assert all(torch.equal(net[k], v) for k, v in saved.items() if not k.startswith("fc."))
    assert net["fc.weight"].shape[0] == 7
    checkpoint = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    same = create_net("test_resnet", classes=10, size=32, finetune_from=checkpoint).state_dict()
    assert all(torch.equal(same[k], v) for k, v in saved.items())
    with pytest.raises(NetError, match="has weights of another network: it has no "):
        create_net("test_vit", classes=10, size=32, finetune_from=source)


def test_resuming_anneals_to_the_new_end_and_another_loss_warns(
    train: Train, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(*SMALL, "--loss", "ce", "--epochs", "2", "--seed", "1", "-o", str(out), "--json")
    assert "has 2 epochs already; --epochs 3 or more goes on" in (
        train("--resume", str(out), code=1).output
    )
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    wrong = train("--resume", str(out), "--epochs", "5", "--net", "test_vit", code=1).output
    assert "was trained with net='test_resnet', got 'test_vit'" in wrong
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlo_timm.trainer.build.load_data", _no_data)
        train("--resume", str(out), "--epochs", "5", code=1)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # Killed after an epoch was written and before it was saved: it is there once in the end.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "split": "train", "loss": 7.0}\n{"epoch": 3, "sp')
    result = train("--resume", str(out), "--epochs", "5", "--loss", "focal", "--json")
    assert f"warning: {out} was trained with loss 'ce'; it goes on with 'focal'" in result.stderr
    epochs = [r["epoch"] for r in read_metrics(out) if r["split"] == "train"]
    assert epochs == [1, 2, 3, 4, 5]
    cosine = [1e-3 * 0.5 * (1 + math.cos(math.pi * t / 5)) for t in (2, 3, 4)]
    assert values(out, "lr", "train")[2:] == pytest.approx(cosine)
    assert len((out / "metrics.csv").read_text().splitlines()) == 6


def _no_data(*args: Any, **kwargs: Any) -> Any:
    raise RunError("the disk is gone")


def test_a_folder_with_a_run_is_replaced_only_when_asked(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(*SMALL, "--epochs", "1", "-o", str(out), "--json")
    assert f"{str(out)!r} is there already; --overwrite replaces the run in it, --resume" in (
        train(*SMALL, "--epochs", "1", "-o", str(out), code=1).output
    )
    (out / "notes.txt").write_text("mine")
    train(*SMALL, "--epochs", "1", "-o", str(out), "--overwrite", "--json")
    assert (out / "notes.txt").read_text() == "mine"
    assert len(values(out, "ce")) == 1


def test_a_diverged_run_says_so_and_fails(train: Train, tmp_path: Path) -> None:
    argv = (*SMALL, "--loss", "ce", "--opt", "sgd", "--lr", "1e30", "--epochs", "3")
    result = train(*argv, "-o", str(tmp_path / "run"), code=1)
    assert "Error: the run diverged in epoch 1: " in result.output
    assert "try a smaller --lr, --warmup-epochs or --clip-grad 1" in result.output
    assert read_run(tmp_path / "run")["status"] == "diverged"


def test_what_timm_offers_trains(train: Train, tmp_path: Path) -> None:
    """Average, layer decay, accumulation, clipping, erasing, drop path, a schedule by updates."""
    teacher = tmp_path / "teacher"
    train(*SMALL, "--epochs", "1", "-o", str(teacher), "--json")
    argv = ["--ema", "--model-ema-decay", "0.5", "--opt", "adamw", "--layer-decay", "0.8"]
    argv += ["--grad-accum", "2", "--clip-grad", "1", "--clip-mode", "agc", "--reprob", "0.5"]
    argv += ["--drop-path", "0.1", "--sched-on-updates", "--warmup-epochs", "1", "--channels-last"]
    argv += ["--mixup", "0.8", "--cutmix", "1", "--smoothing", "0.1", "--aa", "rand-m3-n1"]
    argv += ["--kd-model", str(teacher), "--precision", "bf16", "--train-limit", "33"]
    train(*SMALL, *argv, "--epochs", "2", "-o", str(tmp_path / "run"), "--json")
    state = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    names = set(state["state_dict"])
    assert not [name for name in names if "teacher" in name]
    saved = weights(tmp_path / "run")
    assert all(torch.equal(state["state_dict"][f"ema.module.{n}"], v) for n, v in saved.items())
    # 33 images in batches of 16: the last, of one, is left out; two batches make an update.
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2


def test_plateau_lowers_the_step_size_and_remembers_it_over_a_resume(
    train: Train, tmp_path: Path
) -> None:
    argv = (*SMALL, "--scheduler", "plateau", "--patience-epochs", "0", "--opt", "sgd")
    for name, epochs in (("a", "3"), ("b", "1")):
        train(*argv, "--lr", "1e-6", "--seed", "1", "--epochs", epochs, "-o", name, "--json")
    train("--resume", "b", "--epochs", "3", "--json")
    assert values(tmp_path / "a", "lr", "train") == values(tmp_path / "b", "lr", "train")
    assert values(tmp_path / "a", "lr", "train")[-1] < 1e-6


def test_an_odd_batch_is_mixed_and_smoothed() -> None:
    from rlo_timm.trainer.module import _mixed
    from timm.data.mixup import Mixup

    mixup = Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=4)
    images, target = _mixed(mixup, torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 2, 3, 0]))
    assert images.shape == (5, 3, 4, 4)
    assert target.shape == (5, 4)
    assert (target > 0.02).all()  # smoothed: nothing is 0
    torch.testing.assert_close(target.sum(-1), torch.ones(5))


def test_print_config_is_what_training_uses(train: Train) -> None:
    out = train("--net", "ViT", "--dataset", "CIFAR10", "--loss", "root", "--print-config").output
    config = yaml.safe_load(out)
    assert (config["net"], config["dataset"], config["size"]) == ("vit", "cifar10", 32)
    assert (config["loss"], config["k"], config["lr"]) == ("rlo:k=3,m=3", None, 1e-4)
    assert config["precision"] in ("32-true", "bf16-mixed", "16-mixed")
    Path("again.yaml").write_text(out)
    assert train("-c", "again.yaml", "--print-config").output == out
    assert "unknown opt" in train("--opt", "adamm", "--print-config", code=1).output


def test_the_measures_are_those_of_torchmetrics() -> None:
    from rlo_timm.trainer.measures import Measures
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
    )

    logits, labels = torch.randn(64, 7) * 3, torch.randint(7, (64,))
    ours = Measures(torch.device("cpu"))
    for rows in (slice(0, 30), slice(30, 64)):
        loss = torch.nn.functional.cross_entropy(logits[rows], labels[rows])
        ours.update(logits[rows], labels[rows], loss)
    result, p = ours.result(), logits.softmax(-1)
    assert result["ce"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert result["loss"] == pytest.approx(result["ce"])
    for k, name in ((1, "acc1"), (5, "acc5")):
        theirs = multiclass_accuracy(p, labels, 7, average="micro", top_k=k)
        assert result[name] == pytest.approx(float(theirs))
    ece = multiclass_calibration_error(p, labels, 7, n_bins=15)
    assert result["ece"] == pytest.approx(float(ece), abs=1e-6)


def test_eval_gives_the_numbers_of_the_run_whatever_the_batch(train: Train, tmp_path: Path) -> None:
    result = train(*SMALL, "--epochs", "1", "-o", "run", "--json")
    wanted = json.loads(result.stdout)
    argv = ["eval", "run", "digits", "--val-limit", "20", "-b", "7", "--json"]
    done = CliRunner().invoke(main, argv)
    assert done.exit_code == 0, done.output
    measured = json.loads(done.stdout)
    assert measured["images"] == 20
    for name in ("acc1", "acc5", "ce", "ece"):
        assert measured[name] == pytest.approx(wanted[name], rel=1e-5), name
    for model, message in (
        ("nowhere", "unknown net 'nowhere'"),
        (str(tmp_path), "has no model.safetensors and config.json: it is no finished run"),
        ("test_vit.r160_in1k", "could not be opened: "),
    ):
        failed = CliRunner().invoke(main, ["eval", model, "digits"])
        assert failed.exit_code == 1
        assert message in failed.output


def test_train_called_from_python_returns_what_the_command_prints(tmp_path: Path) -> None:
    import rlo_timm

    settings = rlo_timm.TrainSettings(
        dataset="Digits", net="test_resnet", batch_size=16, train_limit=32, val_limit=20,
        workers=0, epochs=1, device="cpu", seed=1, logger="none",
    )  # fmt: skip
    try:
        result = rlo_timm.train(settings, out=tmp_path / "run")
        assert (result.run, result.loss, result.epochs) == (tmp_path / "run", "rlo:k=3,m=3", 1)
        measured = rlo_timm.evaluate(tmp_path / "run", "digits", limit=20)
        assert measured.acc1 == pytest.approx(result.acc1)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    import subprocess
    import sys

    entry = str(Path(sys.executable).parent / "rlo-timm")
    argv = [*SMALL, "--epochs", "1", "--seed", "1", "--json", "-o", str(tmp_path / "run")]
    ddp = ["--devices", "2", "--strategy", "ddp"]
    done = subprocess.run(
        [entry, "train", *argv, *ddp], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert read_run(tmp_path / "run")["status"] == "done"
    measured = CliRunner().invoke(
        main, ["eval", str(tmp_path / "run"), "digits", "--val-limit", "20", "--json"]
    )
    # 20 images on two devices, each counted once.
    assert values(tmp_path / "run", "ce") == pytest.approx([json.loads(measured.stdout)["ce"]])


@pytest.mark.slow
def test_real_cifar10_in_parquet(train: Train, tmp_path: Path, shared_data: Path) -> None:
    argv = ("--dataset", str(shared_data / "cifar10"), "--net", "res18", "--epochs", "1")
    limits = ("--train-limit", "64", "--val-limit", "64", "-b", "32")
    train(*argv, *limits, "--device", "cpu", "--workers", "0", "-o", str(tmp_path / "r"), "--json")
    document = read_run(tmp_path / "r")
    assert document["data"]["classes"] == 10
    assert math.isfinite(document["summary"]["ce"])
