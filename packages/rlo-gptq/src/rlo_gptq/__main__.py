"""`python -m rlo_gptq`, which is also what `torchrun -m rlo_gptq` runs."""

from __future__ import annotations

from rlo_gptq.cli.main import main

if __name__ == "__main__":
    main(prog_name="rlo-gptq")
