"""`rlo-timm train` end to end on scikit-learn's digits, and on real CIFAR-10 if it is at hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from rlo_core.runs.record import read_metrics, read_run
from rlo_timm.cli import main
from safetensors.torch import load_file

SMALL = ["--dataset", "digits", "--net", "test_resnet", "-b", "16", "--device", "cpu"]
SMALL += ["--workers", "0", "--lr", "1e-3"]
SMALL += ["--train-limit", "32", "--val-limit", "20"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

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
    from rlo_timm.trainer.settings import Settings

    assert str(Settings().spec()) == "rlo:k=3,m=3"
    assert (learning_rate("vit"), learning_rate("res18")) == (1e-4, 1e-3)
    assert str(Settings(loss="root", k=8, m=10).spec()) == "rlo:k=8,m=10"
    assert str(Settings(loss="ce").spec()) == "ce"


def test_a_run_writes_everything_and_its_numbers_agree(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(*SMALL, "--k", "8", "--m", "10", "--epochs", "2", "--seed", "3", "-o", str(out))
    assert "report.html" in result.output
    for name in (
        "run.json",
        "metrics.jsonl",
        "config.yaml",
        "report.html",
        "csv/version_0/metrics.csv",
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
    from rlo_timm.trainer.nets import create_net
    from rlo_timm.trainer.settings import Settings

    net = create_net("test_resnet", classes=10, size=32)
    net.load_state_dict(weights(out))
    data = load_data(Settings(dataset="digits", val_limit=20))
    images, labels = zip(*[data.val[i] for i in range(20)], strict=True)
    with torch.no_grad():
        logits = net.eval()(torch.stack(images)).double()
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
        (("--scheduler", "step"), "scheduler must be 'cosine' or 'none', got 'step'"),
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


def test_options_come_from_yaml_and_flags_win(train: Train, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("net: swin\nbatch-size: 8\nlr: 1e-3\n")
    config = yaml.safe_load(train("-c", "c.yaml", "--net", "vit", "--print-config").output)
    assert (config["net"], config["batch_size"], config["lr"]) == ("vit", 8, 1e-3)
    (tmp_path / "bad.yaml").write_text("nte: swin\n")
    assert "bad.yaml has no option 'nte'; there are dataset" in (
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


def test_a_mixed_step_sees_soft_targets(train: Train, tmp_path: Path) -> None:
    argv = (*SMALL, "--mixup", "0.8", "--smoothing", "0.1", "--epochs", "1", "--json")
    train(*argv, "-o", str(tmp_path / "run"))
    assert math.isfinite(values(tmp_path / "run", "loss", "train")[0])


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
    assert len(values(tmp_path / "run", "ce")) == 1


@pytest.mark.slow
def test_real_cifar10_in_parquet(train: Train, tmp_path: Path, shared_data: Path) -> None:
    argv = ("--dataset", str(shared_data / "cifar10"), "--net", "res18", "--epochs", "1")
    limits = ("--train-limit", "64", "--val-limit", "64", "-b", "32")
    train(*argv, *limits, "--device", "cpu", "--workers", "0", "-o", str(tmp_path / "r"), "--json")
    document = read_run(tmp_path / "r")
    assert document["data"]["classes"] == 10
    assert math.isfinite(document["summary"]["ce"])
