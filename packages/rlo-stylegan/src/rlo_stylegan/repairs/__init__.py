"""The repairs of the layer `compat`: what each looks for and what it makes of it."""

from rlo_stylegan.repairs.base import Level, Repair
from rlo_stylegan.repairs.removed import (
    NumpyAlias,
    ParseVersion,
    PillowAlias,
    SqrtmPair,
    StrToBool,
)
from rlo_stylegan.repairs.torch_api import AdamBetas, PluginModule, SamplerArgument, SharedBuffers

REPAIRS: tuple[type[Repair], ...] = (
    SamplerArgument,
    PluginModule,
    ParseVersion,
    StrToBool,
    NumpyAlias,
    PillowAlias,
    SqrtmPair,
    AdamBetas,
    SharedBuffers,
)

__all__ = [
    "REPAIRS",
    "AdamBetas",
    "Level",
    "NumpyAlias",
    "ParseVersion",
    "PillowAlias",
    "PluginModule",
    "Repair",
    "SamplerArgument",
    "SharedBuffers",
    "SqrtmPair",
    "StrToBool",
]
