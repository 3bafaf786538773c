"""What `rlo` knows of this host."""

from __future__ import annotations

from rlo_core.hosts import Host

HOST = Host(
    name="stylegan",
    summary="the rooted loss in StyleGAN2-ADA and its relatives, reversible",
    command="rlo_stylegan.cli:main",
    requires={"libcst": ">=1.5"},
)
