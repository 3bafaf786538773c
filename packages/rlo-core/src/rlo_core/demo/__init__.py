"""What `make demo` runs: each installed package's part, and the digits one of the core."""

from rlo_core.demo.parts import demo_parts, run_demo

__all__ = ["demo_parts", "run_demo"]
