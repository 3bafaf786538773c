"""No name that people import goes by accident: PUBLIC_API.txt is held against the code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACKAGES = ["rlo-core", "rlo-timm", "rlo-hf", "rlo-gptq", "rlo-stylegan"]


@pytest.fixture(scope="module")
def api(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("public_api", root / "scripts" / "public_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_public_name_of_the_inventory_is_there_and_takes_what_it_took(
    api: ModuleType, package: str
) -> None:
    gone, new = api.compare(api.listed(package), api.inventory(package))
    assert not gone, (
        f"{package} promised: {gone}; keep them, or deprecate them as CONTRIBUTING.md says"
    )
    assert not new, f"{package} has new public names, run `make public-api`: {new}"


@pytest.mark.parametrize(
    ("before", "now", "problem"),
    [
        ("m.f(a, *, k=)", "m.f(a, *, k=, new=)", None),
        ("m.f(a, *, k=)", "m.f(a, new=, *, k=)", None),
        ("m.f(a, *, k=)", "m.f(a, **rest)", None),
        ("m.f(a, *, k=)", "m.f(a)", "m.f takes no k any more"),
        ("m.f(a, *, k=)", "m.f(a, *, k)", "m.f cannot do without k any more"),
        ("m.f(a)", "m.f(a, b)", "m.f asks for b"),
        ("m.f(a=, b=)", "m.f(b=, a=)", "m.f has its positional parameters in another order: b, a"),
        ("m.f(a, b=)", "m.f(a, *, b=)", "m.f has its positional parameters in another order: a"),
        ("$ rlo plot --out", "$ rlo plot", "$ rlo plot --out is gone"),
    ],
)
def test_the_inventory_tells_a_change_that_breaks_callers_from_one_that_does_not(
    api: ModuleType, before: str, now: str, problem: str | None
) -> None:
    gone, _ = api.compare([before], [now])
    assert gone == ([problem] if problem else [])
