"""What `rlo` knows of this host."""

from __future__ import annotations

from rlo_core.hosts import Host

HOST = Host(
    name="timm",
    summary="`timm train.py --loss rlo` on the unmodified script, and a built-in trainer",
    command="rlo_timm.cli:main",
    requires={
        "timm": ">=1.0.12,<2",
        "lightning": ">=2.6",
        "torchvision": ">=0.21",
    },
)

COMPARER = Host(
    name="timm",
    summary="images, by the trainer of `rlo-timm train`",
    command="rlo_timm.compare_command:command",
)
