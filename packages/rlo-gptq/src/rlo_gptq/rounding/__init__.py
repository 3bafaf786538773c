"""Rounding algorithms, each a pure function of tensors."""
