"""The `rlo-gptq` command."""
