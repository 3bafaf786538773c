"""The packed checkpoint: how transformers and vLLM load it, and what is checked first."""
