"""What this package uses of its peers that they do not promise: all of it is named here.

The upper bounds in pyproject.toml are there because of it, and a test says which peer has lost one.
"""

from __future__ import annotations

from torch import nn

PRIVATE: tuple[tuple[str, str, str, str], ...] = (
    ("torch", "2.15.0", "torch.nn", "Module._forward_hooks"),
    ("torch", "2.15.0", "torch.nn", "Module._forward_pre_hooks"),
    ("transformers", "5.23.0", "transformers", "Trainer._get_num_items_in_batch"),
    ("transformers", "5.23.0", "transformers", "Trainer._loss_shifts_labels"),
    ("transformers", "5.23.0", "transformers", "Trainer._set_signature_columns_if_needed"),
    ("transformers", "5.23.0", "transformers", "Trainer._signature_columns"),
    ("trl", "1.16.0", "trl", "GRPOTrainer._entropy_bonus_enabled"),
    ("trl", "1.16.0", "trl", "GRPOTrainer._get_per_token_logps_and_entropies"),
)
"""Peer, the version in which it was seen, module, name (with dots for what is in a class).

Methods of the trainers are overridden or called, and their attributes read or set, by the mixins of
this package.
"""


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module's call does more, or something else, than its class's forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__
