"""LLaMA-Factory: `python -m rlo_hf.llamafactory train FILE.yaml --loss rlo:k=5`.

Everything but `--loss` (and `--no-check`) goes to `llamafactory-cli`, which runs as it is; its
trainer, in this process or in those that it starts, is given the loss. The flags `use_dft_loss`,
`use_eaft_loss` and `use_asft_loss` fill the same slot and are refused beside it: they are
`dft`, `ce*eaft:norm=3` and `dft+kl` here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlo_core.errors import RLOError


def main(arguments: Sequence[str]) -> None:
    """Run `llamafactory-cli` with a loss.

    Args:
        arguments: Its words, with `--loss SPEC` among them.

    Raises:
        RLOError: no loss, or none took it.
    """
    from rlo_hf.cli import split_loss
    from rlo_hf.script import run_with_loss

    loss, rest = split_loss(tuple(arguments))
    if loss is None:
        raise RLOError("--loss SPEC is missing; without it, run llamafactory-cli itself")
    check = "--no-check" not in rest
    words = [word for word in rest if word != "--no-check"]
    run_with_loss("llamafactory-cli", words, loss, check=check)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RLOError as error:
        sys.exit(f"Error: {error}")
