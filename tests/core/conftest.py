"""A real distribution with plugins, installed on a path of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GOOD = '''
import torch
from rlo_core.links import Link

class SquareRoot(Link):
    def __init__(self, scale):
        self.scale = scale
    def value(self, ce):
        return self.scale * (torch.sqrt(1.0 + 2.0 * ce) - 1.0)
    def slope(self, ce):
        return self.scale / torch.sqrt(1.0 + 2.0 * ce)

def square_root(scale: float = 1.0, steep: bool = False, name: str | None = None, *,
                weight=None, ignore_index: int = -100, label_smoothing: float = 0.0,
                reduction: str = "mean"):
    from rlo_core.modules import LinkLoss
    return LinkLoss(SquareRoot(2 * scale if steep else scale), weight=weight,
                    ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)

class Margin(torch.nn.Module):
    """A loss that is no function of cross entropy, and takes no common option but reduction."""
    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.inner = torch.nn.MultiMarginLoss(reduction=reduction)
    def forward(self, logits, target):
        return self.inner(logits, target)

not_callable = 3
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a distribution: its modules, its metadata and its entry points, as pip would."""

    def install(
        name: str, version: str, modules: dict[str, str], groups: dict[str, dict[str, str]]
    ) -> None:
        site = tmp_path / f"site-{name}"
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = []
        for group, entries in groups.items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()

    before = set(sys.modules)
    yield install
    for module in set(sys.modules) - before:
        if module.startswith("plugin_"):
            del sys.modules[module]


@pytest.fixture
def good_plugin(install: Callable[..., None]) -> None:
    """A package with a loss that has a link and one that has none."""
    install(
        "good-losses",
        "2.0",
        {"plugin_good": GOOD},
        {
            "rlo_core.losses": {
                "square-root": "plugin_good:square_root",
                "margin": "plugin_good:Margin",
            }
        },
    )


@pytest.fixture
def bad_plugin(install: Callable[..., None]) -> None:
    """A package whose losses cannot be had, and a host that cannot either."""
    install(
        "bad-losses",
        "1.0",
        {"plugin_bad": "1 / 0\n", "plugin_odd": "three = 3\n"},
        {
            "rlo_core.losses": {"bad": "plugin_bad:loss", "odd": "plugin_odd:three"},
            "rlo_core.hosts": {"badhost": "plugin_bad:HOST"},
        },
    )


@pytest.fixture
def leaving_plugin(install: Callable[..., None]) -> None:
    """A package whose every plug-in calls sys.exit when it is imported."""
    groups = ["losses", "gates", "hosts", "comparers", "demos", "model_loaders"]
    groups.append("adapter_initializers")
    install(
        "leaving",
        "1.0",
        {"plugin_leaving": "import sys\nsys.exit(3)\n"},
        {f"rlo_core.{group}": {"leaving": "plugin_leaving:thing"} for group in groups},
    )
