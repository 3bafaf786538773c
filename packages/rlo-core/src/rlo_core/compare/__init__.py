"""`rlo compare`: does another loss help on this data? Importing it imports no torch and no Optuna.

A host gives a `rlo_core.compare.task.Task`; the search is Optuna's; the verdict is paired
differences to cross entropy with intervals.
"""

from __future__ import annotations
