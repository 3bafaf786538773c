"""The criteria: drop-in for nn.CrossEntropyLoss, mutable, saved and restored."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from rlo_core import (
    BinaryLinkLoss,
    CELoss,
    DFTLoss,
    FocalLoss,
    GCELoss,
    LinkLoss,
    Poly1Loss,
    RootedConvexLoss,
    RootedLoss,
    link_binary_cross_entropy,
    rooted_loss,
)
from rlo_core.links import RootedConvex
from torch import nn

CRITERIA = [
    CELoss(),
    RootedLoss(3.0, 2.0),
    RootedConvexLoss(8.0, ignore_index=1),
    FocalLoss(2.0, 0.5),
    GCELoss(0.5, reduction="sum"),
    DFTLoss(label_smoothing=0.1),
    Poly1Loss(2.0, weight=torch.tensor([1.0, 2.0, 3.0])),
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_pickle_and_copy_keep_the_loss(criterion: LinkLoss) -> None:
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = criterion(logits, target)
    for twin in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        torch.testing.assert_close(twin(logits, target), expected, rtol=0, atol=0)
        assert repr(twin) == repr(criterion)


@pytest.mark.parametrize("kind", [RootedLoss, RootedConvexLoss])
def test_k_and_m_are_attributes_that_take_effect(
    kind: type[RootedLoss] | type[RootedConvexLoss],
) -> None:
    criterion = kind(3.0, 3.0)
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    criterion.k, criterion.m = 8.0, None
    assert (criterion.k, criterion.m) == (8.0, None)
    torch.testing.assert_close(criterion(logits, target), kind(8.0)(logits, target))
    with pytest.raises(ValueError, match=r"^k must be positive, got 0$"):
        criterion.k = 0


def test_the_state_dict_carries_k_m_and_the_targets_of_a_schedule(tmp_path: object) -> None:
    model = nn.Sequential(nn.Linear(2, 3), RootedLoss(8.0, 10.0, warmup=0.5))
    model[1].set_progress(0.25)
    path = f"{tmp_path}/state.pt"
    torch.save(model.state_dict(), path)
    other = nn.Sequential(nn.Linear(2, 3), RootedLoss(2.0, warmup=0.5))
    other.load_state_dict(torch.load(path, weights_only=True))
    assert (other[1].k, other[1].m) == (model[1].k, model[1].m)
    other[1].set_progress(0.5)
    assert (other[1].k, other[1].m) == (8.0, 10.0)


def test_class_weights_move_with_the_module() -> None:
    criterion = RootedLoss(weight=torch.ones(3)).to(torch.float64)
    assert criterion.weight is not None
    assert criterion.weight.dtype == torch.float64


def test_a_training_script_needs_one_word_changed() -> None:
    model = nn.Linear(4, 3)
    criterion = RootedLoss()  # where nn.CrossEntropyLoss() stood
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    x = x + nn.functional.one_hot(y, 4) * 4.0
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_defaults_are_the_authors() -> None:
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(
        RootedLoss()(logits, target), rooted_loss(logits, target, k=3.0, m=3.0)
    )
    assert (FocalLoss().link.gamma, FocalLoss().link.alpha) == (3.0, 0.25)  # type: ignore[attr-defined]


def test_repr_shows_what_is_in_force() -> None:
    assert repr(RootedLoss(3.0)) == "RootedLoss(Rooted(k=3.0, m=None), reduction='mean')"
    criterion = GCELoss(0.5, label_smoothing=0.1, ignore_index=-1)
    assert repr(criterion) == (
        "GCELoss(GCE(q=0.5), label_smoothing=0.1, ignore_index=-1, reduction='mean')"
    )


def test_the_binary_form_follows_the_schedule_of_its_criterion() -> None:
    criterion = RootedConvexLoss(2.0, warmup=1.0)
    binary = BinaryLinkLoss(criterion)
    logits, target = torch.randn(5), torch.ones(5)
    for progress in (0.0, 0.5, 1.0):
        criterion.set_progress(progress)
        expected = link_binary_cross_entropy(logits, target, criterion.link)
        torch.testing.assert_close(binary(logits, target), expected)
    assert criterion.link == RootedConvex(2.0)


def test_cross_entropy_at_the_start_of_a_warmup_is_torchs() -> None:
    criterion = RootedLoss(4.0, warmup=0.2)
    assert math.isinf(criterion.k)
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(criterion(logits, target), nn.CrossEntropyLoss()(logits, target))
