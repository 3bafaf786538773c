"""The loss class of a checkout with `GanLoss` in it, in memory: what `rlo-stylegan train` names.

A training loop makes its loss from `loss_kwargs.class_name`; with that set to `FACTORY` the loop
calls `patched_loss` here, in every process, spawned ones too.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import CodeType
from typing import Any

from rlo_stylegan.criterion import GanLoss, Report
from rlo_stylegan.errors import CheckoutError
from rlo_stylegan.sites import replace_terms

FACTORY = "rlo_stylegan.factory.patched_loss"


class _TermsReplaced(SourceFileLoader):
    """Load a loss module with its three terms replaced; the file and its line numbers stay true."""

    def __init__(self, fullname: str, path: str, owner: str) -> None:
        super().__init__(fullname, path)
        self.owner = owner

    def get_code(self, fullname: str) -> CodeType:
        # Not SourceLoader's: it would cache the changed code as that of the file.
        path = self.get_filename(fullname)
        module, _ = replace_terms(self.get_data(path), self.owner, name=path)
        return self.source_to_code(module.bytes, path)


@cache
def patched_class(name: str) -> type[Any]:
    """Return the class `MODULE.CLASS` of the checkout on `sys.path`, its terms replaced.

    The original module is imported as usual and not changed.

    Raises:
        CheckoutError: the class is not there, or its terms are not understood.
    """
    module_name, _, owner = name.rpartition(".")
    original = importlib.import_module(module_name)
    path = original.__file__
    if path is None:
        raise CheckoutError(f"{module_name} must be a file, got a module without one")
    copy_name = f"{module_name}__rlo"
    loader = _TermsReplaced(copy_name, os.fspath(path), owner)
    spec = spec_from_file_location(copy_name, path, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    loss_type = getattr(module, owner)
    assert isinstance(loss_type, type)
    return loss_type


def _report() -> Report | None:
    """Return the checkout's own way to report a statistic, where it has one."""
    try:
        stats = importlib.import_module("torch_utils.training_stats")
    except ImportError:
        return None
    report: Report | None = getattr(stats, "report", None)
    return report


def patched_loss(*, base_class: str, gan_loss: str, **options: Any) -> Any:
    """Return a loss object of the checkout whose three terms are `gan_loss`.

    Args:
        base_class: The checkout's own class, e.g. "training.loss.StyleGAN2Loss".
        gan_loss: A spec.
        options: What the training loop gives the checkout's class.
    """
    loss = patched_class(base_class)(**options)
    loss.gan_loss = GanLoss(gan_loss, report=_report())
    return loss
