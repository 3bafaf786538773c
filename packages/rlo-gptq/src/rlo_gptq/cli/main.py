"""The `rlo-gptq` command. Importing this module imports no torch."""

from __future__ import annotations

import os
import sys

import click
from rlo_core.cli.groups import FriendlyGroup

from rlo_gptq import __version__
from rlo_gptq.cli.evaluate import compare, evaluate, inspect
from rlo_gptq.cli.formats import export, import_
from rlo_gptq.cli.merge import merge
from rlo_gptq.cli.pareto import pareto
from rlo_gptq.cli.plan import plan
from rlo_gptq.cli.quantize import quantize
from rlo_gptq.cli.tune import tune


@click.group(cls=FriendlyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rlo-gptq")
def main() -> None:
    """Quantize language models at 2 to 8 bits; tune, evaluate, compare, export them."""
    # Read-only for those who set it; two processes on one machine otherwise warn at every fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # libraries draw their bars into log files too
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


for command in (quantize, plan, pareto, tune, evaluate, inspect, compare, export, import_, merge):
    main.add_command(command)
