"""Every refusal says what was expected, what was got, and the way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rlo_core import (
    CE,
    Link,
    LinkLinearCrossEntropy,
    Rooted,
    RootedConvex,
    RootedLoss,
    link_linear_cross_entropy,
)
from rlo_core.linear.cce import cce_rows, check_cce
from rlo_core.linear.settings import Settings
from torch import Tensor

HIDDEN, WEIGHT, TARGET = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"weight": torch.zeros(7, 2)},
            ValueError,
            "hidden must have shape (..., D) and weight (V, D), got (4, 3) and (7, 2)",
        ),
        (
            {"target": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "target must have shape (4,) for hidden of shape (4, 3), got (3,)",
        ),
        (
            {"target": torch.zeros(4)},
            TypeError,
            "target must be int64 class indices, got torch.float32",
        ),
        (
            {"target": torch.tensor([0, 1, 7, 0])},
            IndexError,
            "target must be in [0, 7) or ignore_index -100, got 7",
        ),
        ({"bias": torch.zeros(6)}, ValueError, "bias must have shape (7,), got (6,)"),
        (
            {"token_weight": torch.zeros(3)},
            ValueError,
            "token_weight must have shape (4,) like target, got (3,)",
        ),
        (
            {"weight": torch.zeros(7, 3, dtype=torch.bfloat16)},
            TypeError,
            "weight must have the dtype of hidden, torch.float32, got torch.bfloat16; "
            "cast one of them or use torch.autocast",
        ),
        (
            {"hidden": torch.zeros(4, 3, dtype=torch.int64)},
            TypeError,
            "hidden must be floating point, got torch.int64",
        ),
        (
            {"link": RootedLoss(3.0)},
            TypeError,
            "link must be a rlo_core.links.Link, got RootedLoss",
        ),
        ({"softcap": 0.0}, ValueError, "softcap must be positive or None, got 0.0"),
        (
            {"memory_budget": 0},
            ValueError,
            "memory_budget must be a positive number of bytes, got 0",
        ),
        (
            {"impl": "liger"},
            ValueError,
            "impl must be 'auto', 'chunked', 'two-pass', 'torch' or 'cce', got 'liger'",
        ),
        (
            {"reduction": "avg"},
            ValueError,
            "reduction must be 'none', 'mean' or 'sum', got 'avg'",
        ),
        (
            {"hidden": torch.zeros(3), "target": torch.tensor(1), "shift": True},
            ValueError,
            "shift needs a token dimension: target must have shape (..., T), got ()",
        ),
        (
            {"target": torch.zeros(4, dtype=torch.int64, device="meta")},
            ValueError,
            "target must be on the device of hidden, cpu, got meta",
        ),
        (
            {"impl": "cce"},
            ValueError,
            "impl='cce' needs a CUDA device, got cpu; use impl='chunked'",
        ),
        (
            {"impl": "cce", "bias": torch.zeros(7)},
            ValueError,
            "impl='cce' takes no bias; use impl='chunked'",
        ),
        (
            {"impl": "cce", "label_smoothing": 0.1},
            ValueError,
            "impl='cce' takes no label_smoothing, got 0.1; use impl='chunked'",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_words(change, kind, message):
    arguments: dict[str, Any] = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET, "link": CE()}
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        link_linear_cross_entropy(**(arguments | change))


def test_cce_refuses_float32_and_says_what_to_do():
    message = "impl='cce' needs float16 or bfloat16, got torch.float32; use autocast or impl="
    with pytest.raises(ValueError, match=message):
        check_cce(
            torch.zeros(2, 2, device="meta").as_subclass(OnCuda), None, Settings(torch.float32, 7)
        )


class OnCuda(Tensor):
    """Says that it is on a GPU, for a check that looks at nothing else."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


PACKAGE = """
import torch
import torch.nn.functional as F

calls = []


def linear_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, reduction="mean",
                         shift=False, filter_eps="auto"):
    calls.append((e.dtype, filter_eps))
    logits = (e @ c.t()).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
"""


class Squared(Link):
    def value(self, ce: Tensor) -> Tensor:
        return ce**2

    def slope(self, ce: Tensor) -> Tensor:
        return 2 * ce


def test_without_the_package_cce_says_how_to_install_it():
    message = "impl='cce' needs the package cut-cross-entropy: pip install 'rlo-core[cce]'"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        cce_rows(HIDDEN, WEIGHT, TARGET, CE(), Settings(torch.bfloat16, 7))


def test_cce_puts_the_link_on_top_and_filters_only_where_the_slope_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name with the same signature: the real one runs on CUDA only."""
    folder = tmp_path / "cut_cross_entropy"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    hidden = torch.randn(9, 4).requires_grad_()
    weight, target = torch.randn(7, 4), torch.randint(7, (9,))
    target[2] = -100
    for link in (CE(), Rooted(3.0), RootedConvex(3.0), Squared()):
        settings = Settings(torch.bfloat16, 7, softcap=4.0)
        found = cce_rows(hidden, weight, target, link, settings)
        expected = link_linear_cross_entropy(
            hidden.bfloat16(),
            weight.bfloat16(),
            target,
            link,
            softcap=4.0,
            reduction="none",
            impl="torch",
        )
        torch.testing.assert_close(found, expected)
        assert found.sum().requires_grad
    import cut_cross_entropy

    assert [eps for _, eps in cut_cross_entropy.calls] == ["auto", "auto", None, None]
    assert all(dtype == torch.bfloat16 for dtype, _ in cut_cross_entropy.calls)
    monkeypatch.delitem(__import__("sys").modules, "cut_cross_entropy")


def test_the_module_checks_its_options_when_it_is_made():
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'avg'"):
        LinkLinearCrossEntropy(CE(), reduction="avg")  # type: ignore[arg-type]
    text = repr(LinkLinearCrossEntropy(RootedLoss(3.0), shift=True, softcap=30.0))
    assert "softcap=30.0" in text
    assert "shift=True" in text
