"""What `rlo` knows of this host."""

from __future__ import annotations

from rlo_core.hosts import Host

HOST = Host(
    name="gptq",
    summary="quantize language models at 2 to 8 bits; evaluate, inspect, export",
    command="rlo_gptq.cli.main:main",
    requires={"transformers": ">=5.20,<6", "safetensors": ">=0.8"},
)
