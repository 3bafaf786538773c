"""What the estimators use of scikit-learn without its promise; `rlo_core._compat` says why.

Apart from it because the estimators import no torch.
"""

from __future__ import annotations

from sklearn.linear_model._base import LinearClassifierMixin as LinearClassifierMixin
from sklearn.linear_model._base import SparseCoefMixin as SparseCoefMixin
from sklearn.utils.validation import _check_sample_weight as check_sample_weight

__all__ = ["PRIVATE", "LinearClassifierMixin", "SparseCoefMixin", "check_sample_weight"]

PRIVATE: tuple[tuple[str, str, str, str], ...] = (
    ("scikit-learn", "1.9.1", "sklearn.linear_model._base", "LinearClassifierMixin"),
    ("scikit-learn", "1.9.1", "sklearn.linear_model._base", "SparseCoefMixin"),
    ("scikit-learn", "1.9.1", "sklearn.utils.validation", "_check_sample_weight"),
)
"""As `rlo_core._compat.PRIVATE`."""
