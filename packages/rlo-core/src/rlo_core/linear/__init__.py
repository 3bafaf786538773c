"""Fused linear losses: link(ce(hidden @ weight.T)) without ever holding all the logits."""

from __future__ import annotations

from rlo_core.linear.divergence import linear_kl_divergence
from rlo_core.linear.fused import link_linear_cross_entropy, rooted_linear_loss
from rlo_core.linear.gated import gated_linear_cross_entropy
from rlo_core.linear.log_probs import linear_log_probs
from rlo_core.linear.module import LinkLinearCrossEntropy
from rlo_core.linear.plan import Plan, plan_linear_loss
from rlo_core.linear.vocab_parallel import vocab_parallel_linear_cross_entropy

__all__ = [
    "LinkLinearCrossEntropy",
    "Plan",
    "gated_linear_cross_entropy",
    "linear_kl_divergence",
    "linear_log_probs",
    "link_linear_cross_entropy",
    "plan_linear_loss",
    "rooted_linear_loss",
    "vocab_parallel_linear_cross_entropy",
]
