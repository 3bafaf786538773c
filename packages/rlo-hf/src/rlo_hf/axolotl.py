"""Axolotl: `plugins: [rlo_hf.axolotl.RLOPlugin]` and `loss: rlo:k=5` in its YAML."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from rlo_hf.everywhere import adopt


class LossArgs(BaseModel):
    """What the plug-in adds to Axolotl's configuration."""

    loss: str | None = None
    """The spec; None leaves Axolotl's loss."""
    loss_check: bool = True
    """As `check` of `rlo_hf.Trainer`."""


class RLOPlugin(BasePlugin):  # type: ignore[misc]
    """Puts the loss of the configuration in the trainer that Axolotl makes."""

    def get_input_args(self) -> str:
        """Return where the plug-in's part of the configuration is."""
        return "rlo_hf.axolotl.LossArgs"

    def register(self, cfg: Any) -> None:
        """Check the spec before anything is loaded.

        Raises:
            SpecError: unknown loss, option or value.
        """
        if cfg.get("loss") is not None:
            from rlo_core.registry import create_loss

            create_loss(cfg["loss"])

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the trainer its loss.

        Raises:
            RLOError: a trainer whose objective takes none.
        """
        if getattr(cfg, "loss", None) is not None:
            adopt(trainer, cfg.loss, check=getattr(cfg, "loss_check", True) is not False)
