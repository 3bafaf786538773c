"""Checkpoint formats that other tools read: GPTQ (v1 and v2) and compressed-tensors."""
