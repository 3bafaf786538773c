"""`python -m rlo_timm`, and so `torchrun -m rlo_timm train.py ...`."""

from rlo_timm.cli import main

main(prog_name="rlo-timm")
