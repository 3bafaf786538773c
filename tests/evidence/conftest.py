"""The evidence commands are scripts in benchmarks/evidence: their folder goes on sys.path."""

from __future__ import annotations

from pathlib import Path

import pytest

EVIDENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "evidence"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EVIDENCE))


@pytest.fixture
def evidence() -> Path:
    """The folder of the evidence commands."""
    return EVIDENCE
