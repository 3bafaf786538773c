"""The page that is made of any number of runs."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rlo_core.errors import RunError
from rlo_core.runs.curves import read_panels
from rlo_core.runs.record import Run
from rlo_core.runs.report import column_text, write_pictures, write_report


def make_run(folder: Path, loss: str, seed: int, offset: float = 0.0) -> Path:
    run = Run.create(folder, kind="test", loss=loss, seed=seed)
    for epoch in range(4):
        run.log(epoch=epoch, split="val", accuracy=1.0 - math.exp(-epoch) + offset, lr=0.1)
        run.log(epoch=epoch, split="train", ce=math.nan if epoch == 0 else 1.0 / epoch)
    run.log(epoch=3, note="the only one of its kind", odd=1.0)
    run.finish(accuracy=0.95, table=[{"loss": loss, "<b>": 0.12345678}], nested={"ce": 1.5})
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / f"{name}-{seed}", loss, seed, 0.01 * seed)
        for name, loss in (("ce", "ce"), ("rlo", "rlo:k=8,m=10"))
        for seed in (0, 1)
    ]


def test_seeds_of_one_loss_are_one_line_with_a_band(folders: list[Path]) -> None:
    panels = {panel.title: panel for panel in read_panels(folders)}
    assert set(panels) == {"val: accuracy", "train: ce"}
    accuracy = panels["val: accuracy"]
    assert accuracy.index == "epoch"
    assert list(accuracy.lines) == ["ce", "rlo:k=8,m=10"]
    x, mean, low, high = accuracy.lines["ce"].band()
    assert x == [0.0, 1.0, 2.0, 3.0]
    assert [round(h - lo, 9) for lo, h in zip(low, high, strict=True)] == [0.01] * 4
    assert mean[0] == pytest.approx(0.005)
    assert math.isnan(panels["train: ce"].lines["ce"].band()[1][0])


def test_two_runs_with_the_same_loss_and_seed_are_named_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, "ce", 0) for name in ("a", "b")]
    panel = read_panels(folders)[0]
    assert list(panel.lines) == ["ce", "ce (b)"]


def test_a_run_without_a_loss_is_a_line_named_by_its_kind(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", kind="quantize")
    for block in range(2):
        run.log(block=block, proxy=0.5)
    assert list(read_panels([tmp_path / "run"])[0].lines) == ["quantize"]


class Page(HTMLParser):
    """The words and the elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th"):
            self.cells.append(data.strip())


def test_the_page_has_the_tables_and_curves_and_needs_nothing_else(
    folders: list[Path], tmp_path: Path
) -> None:
    text = write_report(folders, tmp_path / "report.html", title="Four <runs>").read_text()
    page = Page(text)
    assert "<title>Four &lt;runs&gt;</title>" in text
    assert "&lt;b&gt;" in text
    assert page.tags.count("svg") == 2
    assert {"rlo:k=8,m=10", "0.1235", "0.95", "nested ce", "1.5"} <= set(page.cells)
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    assert "link" not in page.tags
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s<)]+", text)) <= namespaces
    assert "prefers-color-scheme: dark" in text
    assert text.count("currentColor") > 10


def test_every_curve_is_a_picture_of_its_own(folders: list[Path], tmp_path: Path) -> None:
    written = write_pictures(folders, tmp_path / "pictures")
    assert [path.name for path in written] == ["val-accuracy.png", "train-ce.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([97.78, 97.5], ["97.78", "97.50"]),
        ([1.0, 0.98, None], ["1.00", "0.98", ""]),
        ([0.123456, 2.0], ["0.1235", "2.0000"]),
        ([4.886, 30170.25], ["4.9", "30,170.2"]),
        ([1_044_992, 12], ["1,044,992", "12"]),
        ([0.00054181], ["0.0005418"]),
        (["ce", 1.5], ["ce", "1.5"]),
        ([math.nan, 1.25], ["nan", "1.25"]),
        ([0.0, 0.0], ["0", "0"]),
    ],
)
def test_the_numbers_of_a_column_have_as_many_decimals_as_each_other(
    values: list[object], shown: list[str]
) -> None:
    assert column_text(values) == shown


def test_the_sentence_of_a_table_stands_under_it_and_one_run_reads_down(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", kind="demo")
    run.finish(scores=[{"loss": "ce", "accuracy": 1.0}], notes={"scores": "All is well."}, seven=7)
    text = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert '<p class="note">All is well.</p>' in text
    assert {"seven", "7"} <= set(Page(text).cells)
    assert "notes" not in Page(text).cells


def test_a_run_without_curves_still_has_a_page(tmp_path: Path) -> None:
    Run.create(tmp_path / "r", kind="test").finish(perplexity=12.5)
    text = write_report([tmp_path / "r"], tmp_path / "r" / "report.html").read_text()
    assert "12.5" in Page(text).cells
    assert "Curves" not in text


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        write_report([], tmp_path / "report.html")
    assert str(caught.value) == "a report needs at least one run folder"


@pytest.mark.slow
def test_the_demo_page_opens_in_a_browser_with_its_table_and_pictures(tmp_path: Path) -> None:
    from rlo_core.demo.parts import run_demo

    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no headless browser on this machine")
    run_demo(tmp_path / "demo", parts=["digits"])
    page = tmp_path / "demo" / "report.html"
    options = [browser, "--headless=new", "--no-sandbox", "--disable-gpu"]
    dump = subprocess.run(
        [*options, "--dump-dom", page.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    found = Page(dump)
    assert {"conv", "vit", "ce", "focal", "gce", "rlo", "rlo-convex"} <= set(found.cells)
    assert found.tags.count("svg") >= 6
    shot = tmp_path / "page.png"
    subprocess.run(
        [*options, f"--screenshot={shot}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert shot.stat().st_size > 10_000
    assert len(list((tmp_path / "demo").glob("*.png"))) >= 6
