"""Each of the authors' networks on each of their data sets: one batch, made-up pictures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rlo_timm.trainer import data
from rlo_timm.trainer.fit import train
from rlo_timm.trainer.names import DATASETS, spellings
from rlo_timm.trainer.settings import TrainSettings

CLASSES = {"cifar10": 10, "cifar100": 100, "tiny-imagenet": 200, "food101": 101, "imagenet": 1000}


class Drawn:
    """A data set of torchvision's shape: as many pictures as classes, one of each."""

    def __init__(self, classes: int, side: int) -> None:
        self.targets, self.side = list(range(classes)), side
        self.classes = [f"class {i}" for i in range(classes)]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.new("RGB", (self.side, self.side), (index % 256, 99, 7)), self.targets[index]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny-ImageNet and ImageNet with one picture in each class."""
    root = tmp_path_factory.mktemp("pictures")
    for name, side in (("tiny-imagenet-200", 64), ("imagenet", 96)):
        count = 200 if side == 64 else 1000
        for split in ("train", "val"):
            for number in range(count):
                folder = root / name / split / f"n{number:08d}"
                folder.mkdir(parents=True)
                Image.new("RGB", (side, side), (number % 256, 99, 7)).save(folder / "0.JPEG")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("net", spellings())
@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "digits"])
def test_each_network_trains_on_each_data_set(
    dataset: str, net: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, root: Path, *, fetch: bool) -> list[Any]:
        return [Drawn(CLASSES[name], data.SIZES[name]) for _ in range(2)]

    monkeypatch.setattr(data, "_make", make)
    seen = SimpleNamespace(classes=0)
    load = data.load_data

    def watched(*args: Any, **kwargs: Any) -> data.Data:
        found = load(*args, **kwargs)
        seen.classes = len(found.classes)
        return found

    monkeypatch.setattr("rlo_timm.trainer.build.load_data", watched)
    settings = TrainSettings(
        dataset=dataset, net=net, data_dir=str(folders), batch_size=2, workers=0, device="cpu"
    )
    result = train(settings, fast_dev_run=True)
    assert seen.classes == CLASSES[dataset]
    assert 0.0 < result.ce < 20.0
