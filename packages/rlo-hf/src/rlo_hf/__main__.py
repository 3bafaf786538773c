"""`python -m rlo_hf`, and so `torchrun -m rlo_hf run SCRIPT ...`."""

from rlo_hf.cli import main

main(prog_name="rlo-hf")
