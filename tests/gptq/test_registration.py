"""The finder that registers the checkpoint format, beside other packages' finders."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder

import pytest
from rlo_gptq.checkpoint import registration


class Other:
    """Another package's finder, which finds the awaited module itself."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_spec(self, name, path, target=None):
        self.asked.append(name)
        return PathFinder.find_spec(name, path, target) if name == "awaited_module" else None


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "awaited_module.py").write_text(
        "import sys\nseen = 'quantizer_module' in sys.modules"
    )
    (tmp_path / "quantizer_module.py").write_text("import awaited_module")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registration, "AWAITED", "awaited_module")
    monkeypatch.setattr(registration, "QUANTIZER", "quantizer_module")
    finders = list(sys.meta_path)
    monkeypatch.setattr(
        sys, "meta_path", [f for f in finders if not isinstance(f, registration._Waiter)]
    )
    yield
    for name in ("awaited_module", "quantizer_module"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_the_format_is_registered_beside_another_finder(first):
    other = Other()
    if first:
        sys.meta_path.insert(0, other)
    registration.register_when_needed()
    assert isinstance(sys.meta_path[0], registration._Waiter)
    if not first:
        sys.meta_path.insert(1, other)
    registration.register_when_needed()  # twice is once
    module = importlib.import_module("awaited_module")
    assert not module.seen, "the quantizer is imported after the module has run"
    assert "quantizer_module" in sys.modules
    assert "awaited_module" in other.asked
    assert not any(isinstance(finder, registration._Waiter) for finder in sys.meta_path)


@pytest.mark.usefixtures("modules")
def test_the_format_is_registered_at_once_where_models_are_loaded_already():
    importlib.import_module("awaited_module")
    registration.register_when_needed()
    assert "quantizer_module" in sys.modules
    assert not any(isinstance(finder, registration._Waiter) for finder in sys.meta_path)
