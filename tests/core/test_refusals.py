"""Each mistake gives one line that says what was expected and what was got."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rlo_core import BinaryLinkLoss, RootedLoss, link_binary_cross_entropy, rooted_loss
from rlo_core.links import Rooted

Z = torch.zeros(2, 3)
Y = torch.tensor([0, 1])

REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: rooted_loss(Z, torch.tensor([0])),
        ValueError,
        "target must have shape (2,) for logits of shape (2, 3), got (1,)",
    ),
    (
        lambda: rooted_loss(torch.zeros(2, 3, 4), Y),
        ValueError,
        "target must have shape (2, 4) for logits of shape (2, 3, 4), got (2,)",
    ),
    (
        lambda: rooted_loss(torch.zeros(3), Y),
        ValueError,
        "target must have shape () for logits of shape (3,), got (2,)",
    ),
    (
        lambda: rooted_loss(Z, Y.int()),
        TypeError,
        "target must be int64 class indices or floating probabilities, got torch.int32",
    ),
    (
        lambda: rooted_loss(Z, Y.float()),
        ValueError,
        "probability target must have the shape of logits, (2, 3), got (2,); class indices must be "
        "int64, not torch.float32",
    ),
    (
        lambda: rooted_loss(Z, Z, ignore_index=1),
        ValueError,
        "ignore_index does not apply to probability targets, got 1",
    ),
    (
        lambda: rooted_loss(Z.long(), Y),
        TypeError,
        "logits must be floating point, got torch.int64",
    ),
    (
        lambda: rooted_loss(torch.tensor(1.0), torch.tensor(0)),
        ValueError,
        "logits must have shape (C), (N, C) or (N, C, d1, ..., dK), got ()",
    ),
    (
        lambda: rooted_loss(Z, Y.to("meta")),
        ValueError,
        "target must be on the device of logits, cpu, got meta",
    ),
    (
        lambda: rooted_loss(Z, torch.tensor([0, 3])),
        IndexError,
        "target must be in [0, 3) or ignore_index -100, got 3",
    ),
    (
        lambda: rooted_loss(Z, torch.tensor([0, -1])),
        IndexError,
        "target must be in [0, 3) or ignore_index -100, got -1",
    ),
    (
        lambda: rooted_loss(Z, torch.tensor([5, -1]), ignore_index=-1, label_smoothing=0.1),
        IndexError,
        "target must be in [0, 3) or ignore_index -1, got 5",
    ),
    (
        lambda: rooted_loss(Z, Y, weight=torch.ones(2)),
        ValueError,
        "weight must have shape (3,), got (2,)",
    ),
    (
        lambda: rooted_loss(Z, Y, reduction="avg"),  # type: ignore[arg-type]
        ValueError,
        "reduction must be 'none', 'mean' or 'sum', got 'avg'",
    ),
    (
        lambda: rooted_loss(Z, Y, label_smoothing=1.5),
        ValueError,
        "label_smoothing must be in [0, 1], got 1.5",
    ),
    (lambda: rooted_loss(Z, Y, k=0.0), ValueError, "k must be positive, got 0.0"),
    (lambda: rooted_loss(Z, Y, k=float("nan")), ValueError, "k must be positive, got nan"),
    (lambda: rooted_loss(Z, Y, m=-1.0), ValueError, "m must be positive, got -1.0"),
    (
        lambda: link_binary_cross_entropy(Z, torch.zeros(3), Rooted()),
        ValueError,
        "target must have shape (2, 3) like logits, got (3,)",
    ),
    (
        lambda: link_binary_cross_entropy(Z.long(), Z, Rooted()),
        TypeError,
        "logits must be floating point, got torch.int64",
    ),
    (
        lambda: link_binary_cross_entropy(Z, Z.to("meta"), Rooted()),
        ValueError,
        "target must be on the device of logits, cpu, got meta",
    ),
    (
        lambda: RootedLoss(reduction="avg"),  # type: ignore[arg-type]
        ValueError,
        "reduction must be 'none', 'mean' or 'sum', got 'avg'",
    ),
    (
        lambda: RootedLoss(label_smoothing=-0.1),
        ValueError,
        "label_smoothing must be in [0, 1], got -0.1",
    ),
    (
        lambda: BinaryLinkLoss(Rooted(), reduction="avg"),  # type: ignore[arg-type]
        ValueError,
        "reduction must be 'none', 'mean' or 'sum', got 'avg'",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "words"), REFUSED, ids=[f"{i}-{r[2][:40]}" for i, r in enumerate(REFUSED)]
)
def test_the_message_says_what_it_must_be_and_what_it_was(
    call: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 5, 100, 3000])
@pytest.mark.parametrize("wrong", [-1, -101, 0, 7, 2**40])
def test_a_label_out_of_range_is_never_a_silent_wrong_value(
    wrong: int, classes: int, dtype: torch.dtype
) -> None:
    label = wrong if wrong < 0 else classes + wrong
    target = torch.zeros(9, dtype=torch.long)
    target[4] = label
    with pytest.raises(IndexError) as caught:
        rooted_loss(torch.zeros(9, classes, dtype=dtype), target)
    words = f"target must be in [0, {classes}) or ignore_index -100, got {label}"
    assert str(caught.value) == words
