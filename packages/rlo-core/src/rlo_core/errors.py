"""The one family of errors for everything that is not a mathematical argument."""

from __future__ import annotations


class RLOError(Exception):
    """A known failure, said in one line; a command prints it and exits with status 1."""


class SpecError(RLOError, ValueError):
    """A loss specification that cannot be parsed, or that names an unknown loss or option."""


class PluginError(RLOError):
    """An entry point that fails to import, or a name that two packages claim."""


class DataError(RLOError):
    """A data set that is missing, empty or not laid out as expected."""


class RunError(RLOError):
    """A run folder that cannot be read, or that belongs to other settings."""
