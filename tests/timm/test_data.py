"""Data sets: what is read, what is refused, and the nets' names."""

from __future__ import annotations

import io
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
from rlo_timm.trainer.nets import NETS, create_net, image_size
from rlo_timm.trainer.settings import Settings
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
    settings = Settings(dataset="tiny-imagenet", data_dir=str(tmp_path))
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
    data = load_data(Settings(dataset=str(folders(tmp_path, "train", val)), augment=False))
    assert (len(data.train), len(data.val), data.classes) == (20, 20, ["cat", "dog"])
    image, label = data.val[0]
    assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, 0)
    pixels = torch.from_numpy(np.array(picture(0))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(image, (pixels - mean[:, None, None]) / std[:, None, None])


def test_class_folders_without_splits_hold_out_a_tenth(tmp_path: Path) -> None:
    data = load_data(Settings(dataset=str(folders(tmp_path, "."))))
    assert (len(data.train), len(data.val)) == (18, 2)


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one" / "only").mkdir(parents=True)
    with pytest.raises(DataError, match="must hold a folder of images for each class, at least"):
        load_data(Settings(dataset=str(tmp_path / "one")))
    folders(tmp_path / "half", "train")
    with pytest.raises(DataError, match="has train but none of val, validation, valid, test"):
        load_data(Settings(dataset=str(tmp_path / "half")))
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "b").mkdir()
    with pytest.raises(DataError, match="no images in the class folders of"):
        load_data(Settings(dataset=str(tmp_path / "empty")))


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_with_image_and_label_columns(tmp_path: Path, struct: bool) -> None:
    for name, rows in (("train-0", 6), ("test-0", 4)):
        images = [encoded(i) for i in range(rows)]
        cells = [{"bytes": b, "path": None} for b in images] if struct else images
        table = pa.table({"image": cells, "labels": [i % 3 for i in range(rows)]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    data = load_data(Settings(dataset=str(tmp_path), augment=False))
    assert (len(data.train), len(data.val), data.classes) == (6, 4, ["0", "1", "2"])
    assert [data.train[i][1] for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_parquet_with_other_columns_says_what_was_looked_for(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(DataError) as caught:
        load_data(Settings(dataset=str(tmp_path)))
    assert str(caught.value).endswith(
        "has no image column: looked for img, image, images, picture, pixels, got text, label"
    )


def test_real_cifar10_has_its_classes_and_its_first_label(shared_data: Path) -> None:
    data = load_data(Settings(dataset=str(shared_data / "cifar10"), augment=False))
    assert (len(data.train), len(data.val), data.size) == (20000, 5000, 32)
    assert data.classes[:3] == ["airplane", "automobile", "bird"]
    assert data.train[0][1] == 6  # the frog
    channel_means = torch.stack([data.train[i][0] for i in range(200)]).mean((0, 2, 3))
    assert channel_means.abs().max() < 0.25  # normalised by CIFAR's own statistics


def test_training_images_are_augmented_and_validation_images_are_not() -> None:
    data = load_data(Settings(dataset="digits"))
    first = torch.stack([data.train[i][0] for i in range(8)])
    assert torch.equal(first, torch.stack([data.train[i][0] for i in range(8)]))
    data.train.epoch = 1
    assert not torch.equal(first, torch.stack([data.train[i][0] for i in range(8)]))
    assert torch.equal(data.val[0][0], data.val[0][0])
    assert len(data.train) + len(data.val) == 1797


@pytest.mark.parametrize("net", ["vgg", "res18", "vit_small", "cait", "swin", "simplevit"])
def test_the_authors_nets_are_built_for_small_images(net: str) -> None:
    model = create_net(net, classes=7, size=32)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.slow
@pytest.mark.parametrize("net", list(NETS))
@pytest.mark.parametrize("size", [32, 64])
def test_every_net_of_the_authors_learns_from_an_image(net: str, size: int) -> None:
    size = image_size(net, size)
    model = create_net(net, classes=5, size=size)
    loss = torch.nn.functional.cross_entropy(
        model(torch.randn(2, 3, size, size)), torch.tensor([1, 2])
    )
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_cifar_stem_keeps_the_size_and_timm_knows_the_model() -> None:
    model = timm.create_model("resnet18_cifar", num_classes=10)
    assert model.conv1.stride == (1, 1)
    assert model.layer1(model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32)))).shape[-1] == 32
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 32, 32)


def test_the_384_pixel_vit_keeps_its_size() -> None:
    assert image_size("vit_timm", 32) == 384
    assert image_size("vit", 32) == 32
