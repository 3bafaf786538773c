"""`python -m rlo_stylegan`."""

from rlo_stylegan.cli import main

if __name__ == "__main__":
    main(prog_name="rlo-stylegan")
