"""Folders of runs: what was decided, what was measured, and pages of it."""

from __future__ import annotations

from rlo_core.runs.record import Run as Run
from rlo_core.runs.record import read_metrics as read_metrics
from rlo_core.runs.record import read_run as read_run
