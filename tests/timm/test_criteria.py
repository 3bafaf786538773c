"""What timm's own criteria ask of their targets is kept by the losses that stand in for them."""

from __future__ import annotations

import pytest
import torch
from rlo_core.registry import parse_spec
from rlo_timm.launcher.criteria import counterpart
from timm.loss import BinaryCrossEntropy

OPTIONS = {
    "plain": {},
    "smoothed": {"smoothing": 0.2},
    "dense targets smoothed": {"smoothing": 0.2, "smooth_dense": True},
    "threshold": {"smoothing": 0.2, "target_threshold": 0.15},
    "dense, threshold": {"smoothing": 0.2, "smooth_dense": True, "target_threshold": 0.55},
    "summed": {"smoothing": 0.1, "sum_classes": True},
    "weights": {"weight": torch.tensor([0.5, 1.0, 2.0, 1.0]), "smoothing": 0.1},
    "positives": {"pos_weight": torch.tensor([0.5, 1.0, 2.0, 1.0]), "smoothing": 0.1},
}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_binary_counterpart_of_cross_entropy_is_timms_own(name: str, dense: bool) -> None:
    options = OPTIONS[name]
    if not {"smooth_dense", "sum_classes"}.isdisjoint(options):
        import inspect

        known = inspect.signature(BinaryCrossEntropy).parameters
        if not known.keys() >= options.keys():
            pytest.skip("this timm does not have the option")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    target = torch.rand(6, 4, generator=generator) if dense else torch.arange(6) % 4
    theirs = BinaryCrossEntropy(**options)  # type: ignore[arg-type]
    ours = counterpart(BinaryCrossEntropy(**options), parse_spec("ce"))  # type: ignore[arg-type]
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))
