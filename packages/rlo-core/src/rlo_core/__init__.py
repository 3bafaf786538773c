"""Rooted logistic objectives: one loss family, from DFT through cross entropy to the convex rooted
loss.

Names are imported when they are first used, so that `import rlo_core` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "links": ("CE", "DFT", "GCE", "Focal", "Link", "Poly1", "Rooted", "RootedConvex"),
    "functional": (
        "binary_rooted_convex_loss",
        "binary_rooted_loss",
        "dft_loss",
        "focal_loss",
        "gce_loss",
        "link_binary_cross_entropy",
        "link_cross_entropy",
        "poly1_loss",
        "rooted_convex_loss",
        "rooted_loss",
    ),
    "linear": (
        "LinkLinearCrossEntropy",
        "link_linear_cross_entropy",
        "plan_linear_loss",
        "rooted_linear_loss",
    ),
    "modules": (
        "BinaryLinkLoss",
        "CELoss",
        "DFTLoss",
        "FocalLoss",
        "GCELoss",
        "LinkLoss",
        "Poly1Loss",
        "RootedConvexLoss",
        "RootedLoss",
    ),
    "registry": (
        "LossSpec",
        "available_losses",
        "create_binary_loss",
        "create_loss",
        "link_of",
        "parse_spec",
    ),
    "schedules": ("Schedule", "set_progress"),
    "errors": ("DataError", "PluginError", "RLOError", "RunError", "SpecError"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

if TYPE_CHECKING:
    from rlo_core.errors import DataError as DataError
    from rlo_core.errors import PluginError as PluginError
    from rlo_core.errors import RLOError as RLOError
    from rlo_core.errors import RunError as RunError
    from rlo_core.errors import SpecError as SpecError
    from rlo_core.functional import binary_rooted_convex_loss as binary_rooted_convex_loss
    from rlo_core.functional import binary_rooted_loss as binary_rooted_loss
    from rlo_core.functional import dft_loss as dft_loss
    from rlo_core.functional import focal_loss as focal_loss
    from rlo_core.functional import gce_loss as gce_loss
    from rlo_core.functional import link_binary_cross_entropy as link_binary_cross_entropy
    from rlo_core.functional import link_cross_entropy as link_cross_entropy
    from rlo_core.functional import poly1_loss as poly1_loss
    from rlo_core.functional import rooted_convex_loss as rooted_convex_loss
    from rlo_core.functional import rooted_loss as rooted_loss
    from rlo_core.linear import LinkLinearCrossEntropy as LinkLinearCrossEntropy
    from rlo_core.linear import link_linear_cross_entropy as link_linear_cross_entropy
    from rlo_core.linear import plan_linear_loss as plan_linear_loss
    from rlo_core.linear import rooted_linear_loss as rooted_linear_loss
    from rlo_core.links import CE as CE
    from rlo_core.links import DFT as DFT
    from rlo_core.links import GCE as GCE
    from rlo_core.links import Focal as Focal
    from rlo_core.links import Link as Link
    from rlo_core.links import Poly1 as Poly1
    from rlo_core.links import Rooted as Rooted
    from rlo_core.links import RootedConvex as RootedConvex
    from rlo_core.modules import BinaryLinkLoss as BinaryLinkLoss
    from rlo_core.modules import CELoss as CELoss
    from rlo_core.modules import DFTLoss as DFTLoss
    from rlo_core.modules import FocalLoss as FocalLoss
    from rlo_core.modules import GCELoss as GCELoss
    from rlo_core.modules import LinkLoss as LinkLoss
    from rlo_core.modules import Poly1Loss as Poly1Loss
    from rlo_core.modules import RootedConvexLoss as RootedConvexLoss
    from rlo_core.modules import RootedLoss as RootedLoss
    from rlo_core.registry import LossSpec as LossSpec
    from rlo_core.registry import available_losses as available_losses
    from rlo_core.registry import create_binary_loss as create_binary_loss
    from rlo_core.registry import create_loss as create_loss
    from rlo_core.registry import link_of as link_of
    from rlo_core.registry import parse_spec as parse_spec
    from rlo_core.schedules import Schedule as Schedule
    from rlo_core.schedules import set_progress as set_progress

__version__ = "0.1.0"
__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "linear_model":  # needs the extra rlo-core[sklearn]
        return importlib.import_module("rlo_core.linear_model")
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'rlo_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rlo_core.{module}"), name)


def __dir__() -> list[str]:
    return __all__
