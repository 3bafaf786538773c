"""Data sets: what is read, what is refused, and the nets' names."""

from __future__ import annotations

import dataclasses
import io
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from rlo_core.errors import DataError
from rlo_timm.cli import main
from rlo_timm.trainer.data import load_data
from rlo_timm.trainer.loaders import (
    Inputs,
    TrainBatches,
    ValBatches,
    inputs_of,
    train_loader,
    val_loader,
)
from rlo_timm.trainer.names import dataset_name, net_name
from rlo_timm.trainer.nets import NETS, architecture, create_net, image_size
from rlo_timm.trainer.pictures import ParquetSource, Pictures, stratified
from rlo_timm.trainer.settings import TrainSettings
from rlo_timm.trainer.tiny_imagenet import is_prepared, prepare


def picture(seed: int, size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def tiny_imagenet(root: Path) -> Path:
    """The layout of the archive, two classes of three images."""
    for wnid in ("n01", "n02"):
        folder = root / "tiny-imagenet-200" / "train" / wnid
        (folder / "images").mkdir(parents=True)
        (folder / f"{wnid}_boxes.txt").write_text("")
        for i in range(3):
            picture(i, 64).save(folder / "images" / f"{wnid}_{i}.JPEG")
    val = root / "tiny-imagenet-200" / "val"
    (val / "images").mkdir(parents=True)
    rows = [f"val_{i}.JPEG\tn0{1 + i % 2}\t0\t0\t9\t9\n" for i in range(4)]
    (val / "val_annotations.txt").write_text("".join(rows))
    for i in range(4):
        picture(i, 64).save(val / "images" / f"val_{i}.JPEG")
    return root / "tiny-imagenet-200"


def test_tiny_imagenet_is_refused_unprepared_and_read_prepared(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path)
    settings = TrainSettings(dataset="tiny-imagenet", data_dir=str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_data(settings)
    assert str(caught.value) == (
        f"tiny-imagenet in {str(root)!r} has its images in folders named images, where readers see "
        f"one class; run `rlo-timm prepare tiny-imagenet {root}`"
    )
    dry = CliRunner().invoke(main, ["prepare", "tiny-imagenet", str(tmp_path), "--dry-run"])
    assert "10 images to move" in dry.output
    assert not is_prepared(root)
    done = CliRunner().invoke(main, ["prepare", "tiny-imagenet", str(tmp_path)])
    assert f"{root}: 10 images moved; 2 classes, 6 training and 4 validation" in done.output
    data = load_data(settings)
    assert (len(data.train), len(data.val), data.classes, data.size) == (6, 4, ["n01", "n02"], 64)
    assert [data.val[i][1] for i in range(4)] == [0, 0, 1, 1]
    # timm's own default reader now finds the classes too.
    from timm.data import create_dataset

    assert len(create_dataset("", root=str(root), split="train").reader.class_to_idx) == 2


def test_preparing_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path)
    (root / "train" / "n01" / "images" / "n01_0.JPEG").rename(root / "train" / "n01" / "n01_0.JPEG")
    assert prepare(root).moved == 9
    again = prepare(root)
    assert (again.moved, again.train, again.val) == (0, 6, 4)


def test_an_image_without_a_class_stops_before_anything_moves(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path)
    picture(9, 64).save(root / "val" / "images" / "val_9.JPEG")
    with pytest.raises(DataError, match=r"val_annotations.txt' has no class for 'val_9.JPEG'"):
        prepare(root)
    assert not is_prepared(root)


def folders(root: Path, *splits: str) -> Path:
    for split in splits:
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(10):
                picture(i).save(root / split / label / f"{i}.png")
    return root


@pytest.mark.parametrize("val", ["val", "validation", "test"])
def test_class_folders_with_any_name_of_validation(tmp_path: Path, val: str) -> None:
    data = load_data(TrainSettings(dataset=str(folders(tmp_path, "train", val))))
    assert (len(data.train), len(data.val), data.classes) == (20, 20, ["cat", "dog"])
    assert isinstance(data.val, Pictures)
    inputs = Inputs(32)
    loader = val_loader(data.val, inputs, batch_size=7, workers=0, device=torch.device("cpu"))
    batches = list(loader)
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 10 + [1] * 10
    image = batches[0][0][0]
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.float32)
    pixels = torch.from_numpy(np.array(picture(0))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(image, (pixels - mean[:, None, None]) / std[:, None, None])


def test_class_folders_without_splits_hold_out_a_tenth(tmp_path: Path) -> None:
    data = load_data(TrainSettings(dataset=str(folders(tmp_path, "."))))
    assert (len(data.train), len(data.val)) == (18, 2)


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one" / "only").mkdir(parents=True)
    with pytest.raises(DataError, match="must hold a folder of images for each class, at least"):
        load_data(TrainSettings(dataset=str(tmp_path / "one")))
    folders(tmp_path / "half", "train")
    with pytest.raises(DataError, match="has train but none of val, validation, valid, test"):
        load_data(TrainSettings(dataset=str(tmp_path / "half")))
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "b").mkdir()
    with pytest.raises(DataError, match="no images in the class folders of"):
        load_data(TrainSettings(dataset=str(tmp_path / "empty")))


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_with_image_and_label_columns(tmp_path: Path, struct: bool) -> None:
    for name, rows in (("train-0", 6), ("test-0", 4)):
        images = [encoded(i) for i in range(rows)]
        cells = [{"bytes": b, "path": None} for b in images] if struct else images
        table = pa.table({"image": cells, "labels": [i % 3 for i in range(rows)]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    data = load_data(TrainSettings(dataset=str(tmp_path)))
    assert (len(data.train), len(data.val), data.classes) == (6, 4, ["0", "1", "2"])
    assert [data.train[i][1] for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_parquet_with_other_columns_says_what_was_looked_for(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(DataError) as caught:
        load_data(TrainSettings(dataset=str(tmp_path)))
    assert str(caught.value).endswith(
        "has no image column: looked for img, image, images, picture, pixels, got text, label"
    )


def test_real_cifar10_has_its_classes_and_its_first_label(shared_data: Path) -> None:
    data = load_data(TrainSettings(dataset=str(shared_data / "cifar10")))
    assert (len(data.train), len(data.val), data.size) == (20000, 5000, 32)
    assert data.classes[:3] == ["airplane", "automobile", "bird"]
    assert data.train[0][1] == 6  # the frog
    assert data.cifar  # normalised by CIFAR's own statistics


def epoch(settings: TrainSettings, number: int, workers: int = 0) -> list[torch.Tensor]:
    data = load_data(settings)
    assert isinstance(data.train, Pictures)
    batches = TrainBatches(data.train, 8, seed=1)
    batches.epoch = number
    settings = dataclasses.replace(settings, workers=workers, batch_size=8)
    loader = train_loader(data, settings, Inputs(32), batches, torch.device("cpu"))
    return [images for images, _ in loader]


def test_augmentation_depends_on_seed_and_epoch_and_not_on_workers_or_what_was_drawn() -> None:
    settings = TrainSettings(dataset="digits", train_limit=20, aa="rand-m5-n1-mstd0.5")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    first = epoch(settings, 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    torch.manual_seed(9)
    again, other, worker = epoch(settings, 0), epoch(settings, 1), epoch(settings, 0, workers=2)
    assert [len(batch) for batch in first] == [8, 8, 4]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, worker, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_limit_takes_each_class_its_share() -> None:
    labels = [0] * 60 + [1] * 30 + [2] * 10
    kept = [labels[i] for i in stratified(labels, 20)]
    assert (kept.count(0), kept.count(1), kept.count(2)) == (12, 6, 2)
    assert list(stratified(labels, None)) == list(range(100))
    assert list(stratified(labels, 500)) == list(range(100))


@pytest.mark.parametrize("count", [1, 7, 16, 33])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_devices_share_a_validation_set_without_counting_a_picture_twice(
    count: int, batch_size: int, world: int
) -> None:
    parts = [list(ValBatches(count, batch_size, rank=r, world=world)) for r in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(count))
    if count >= world:
        assert all(batch for part in parts for batch in part)


def test_large_parquet_files_are_read_group_by_group(tmp_path: Path) -> None:
    table = pa.table(
        {"image": [encoded(i) for i in range(12)], "label": [i % 3 for i in range(12)]}
    )
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=3)
    streamed = ParquetSource([tmp_path / "train.parquet"], in_memory=0)
    whole = ParquetSource([tmp_path / "train.parquet"])
    assert streamed.groups is not None
    assert whole.groups is None
    for index in (11, 0, 5, 7):
        assert streamed.sample(index)[1] == whole.sample(index)[1] == index % 3
        assert streamed.sample(index)[0].tobytes() == picture(index).tobytes()
    assert len(streamed._read) <= 2
    order = TrainBatches(Pictures(streamed), 4, seed=0).order().tolist()
    assert sorted(order) == list(range(12))
    assert {i // 3 for i in order[:6]} != set(range(4))  # two groups at a time


def test_a_data_set_of_timm_is_opened_by_its_prefix(tmp_path: Path) -> None:
    root = folders(tmp_path, "train", "validation")
    settings = TrainSettings(dataset="torch/image_folder", data_dir=str(root))
    data = load_data(settings)
    assert (len(data.train), len(data.val), data.classes) == (20, 20, ["cat", "dog"])
    with pytest.raises(DataError, match="dataset 'torch/nothing', split 'train': Unknown torchvi"):
        load_data(TrainSettings(dataset="torch/nothing"))


@pytest.mark.parametrize(
    ("spelt", "name"),
    [("CIFAR10", "cifar10"), ("Tiny-ImageNet", "tiny-imagenet"), ("Food-101", "food101"),
     ("ImageNet1k", "imagenet"), ("cifar-100", "cifar100"), ("./cifar10", "./cifar10")],
)  # fmt: skip
def test_data_sets_are_known_in_any_spelling(spelt: str, name: str) -> None:
    assert dataset_name(spelt) == name


def test_nets_are_known_as_the_authors_write_them() -> None:
    for spelt in ("ViT", "Swin", "CaiT", "VGG", "vit_small", "vit_base", "vit_large", "vit_timm"):
        assert net_name(spelt) in NETS, spelt
    assert architecture("Swin", 224)[0] == architecture("swin_base", 224)[0]
    assert architecture("swin", 224)[0] == "swin_base_patch4_window7_224"
    assert architecture("ResNet18", 32)[0] == "resnet18_cifar"
    assert architecture("resnet18", 32, "imagenet")[0] == "resnet18"
    assert architecture("vgg19", 224, "cifar")[0] == "vgg19_bn_cifar"
    assert architecture("resnet18", 224)[0] == "resnet18"


def test_a_pretrained_net_gets_its_own_statistics() -> None:
    data = load_data(TrainSettings(dataset="digits", val_limit=10))
    net = timm.create_model("vit_base_patch16_384", num_classes=10, depth=1)
    own = inputs_of(TrainSettings(net="vit_timm", pretrained=True), data, net, 384)
    assert (own.mean, own.std, own.crop_pct) == ((0.5,) * 3, (0.5,) * 3, 1.0)
    assert own.interpolation == "bicubic"
    scratch = inputs_of(TrainSettings(net="vit_timm"), data, net, 384)
    assert scratch.mean == (0.485, 0.456, 0.406)
    assert image_size("vit", 32, pretrained=True) == 224


AUTHORS = [(size, net) for size in (32, 64) for net in NETS]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "net"), AUTHORS)
def test_each_net_of_the_authors_takes_a_step_on_images_of_each_shape(size: int, net: str) -> None:
    side = image_size(net, size)
    model = create_net(net, classes=5, size=side)
    loss = torch.nn.functional.cross_entropy(
        model(torch.randn(2, 3, side, side)), torch.tensor([1, 2])
    )
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("net", ["vgg", "res18", "vit_small", "cait", "swin_tiny", "simplevit"])
def test_the_authors_nets_are_built_for_small_images(net: str) -> None:
    model = create_net(net, classes=7, size=32)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_a_cifar_stem_keeps_the_size_and_timm_knows_the_model() -> None:
    model = timm.create_model("resnet18_cifar", num_classes=10)
    assert model.conv1.stride == (1, 1)
    assert model.layer1(model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32)))).shape[-1] == 32
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 32, 32)


def test_the_384_pixel_vit_keeps_its_size() -> None:
    assert image_size("vit_timm", 32) == 384
    assert image_size("vit", 32) == 32
