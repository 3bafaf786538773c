"""Quantize a whole model, one block at a time, resumable."""
