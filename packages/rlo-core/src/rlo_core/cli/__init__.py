"""The `rlo` command."""
