"""What `make demo` runs: each installed package's part, and the digits one of the core."""
