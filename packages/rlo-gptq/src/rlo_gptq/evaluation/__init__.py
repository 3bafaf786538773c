"""Perplexity, tasks, sizes and errors of models, quantized or not."""
