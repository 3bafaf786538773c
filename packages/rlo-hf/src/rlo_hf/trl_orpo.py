"""TRL's experimental ORPOTrainer: no logits, and a link on its odds-ratio term."""

from __future__ import annotations

from typing import Any

from rlo_core.errors import RLOError
from torch import Tensor
from trl.experimental.orpo.orpo_trainer import ORPOTrainer as HostORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from rlo_hf.linear_path import Linear
from rlo_hf.objective import Loss
from rlo_hf.tasks import base_of
from rlo_hf.trl_preference import PreferenceMixin


class ORPOSlot(PreferenceMixin):
    """The slot of `ORPOTrainer`, for any subclass of TRL's."""

    _TERM = "logsigmoid"

    def open_slot(
        self, loss: Loss | None = None, *, check: bool = True, linear: Linear = "auto"
    ) -> None:
        """Put head and loss in a trainer that is made; arguments as `rlo_hf.trl.DPOTrainer`."""
        super().open_slot(loss, check=check, linear=linear)
        if self.linear_path == "fused":
            base: Any = base_of(self._host.model)
            add_fused_lm_head(base, outputs=("log_probs", "mean_logits"))

    def _linked(self, x: Tensor) -> Tensor:
        return -self._link_of(x)

    def _reason_against(self) -> str | None:
        return "it is an encoder-decoder" if self._host.is_encoder_decoder else None

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        """Return what TRL's does, from log-probabilities in the place of logits."""
        if self.linear_path != "fused":
            return super().concatenated_forward(model, batch)  # type: ignore[misc]
        host = self._host
        joined = host.concatenated_inputs(
            batch, padding_value=host.padding_value, device=host.accelerator.device
        )
        chosen = batch["chosen_labels"].shape[0]
        more = {"output_router_logits": True} if host.aux_loss_enabled else {}
        mask = joined["concatenated_attention_mask"]
        labels = joined["concatenated_input_ids"].masked_fill(mask != 1, -100)
        outputs = model(
            joined["concatenated_input_ids"],
            attention_mask=mask,
            labels=labels,
            fused_lm_head=True,
            **more,
        )
        log_probs, kept = outputs.log_probs, outputs.label_mask
        if log_probs.shape[1] != labels.shape[1] - 1:
            raise RLOError("ORPO with prompt tuning needs linear='off'")
        # The cross entropy is over prompt and response, the odds are of the response alone.
        nll = -log_probs[:chosen].sum() / kept[:chosen].sum()
        response = joined["concatenated_labels"][:, 1:] != -100
        means = (log_probs * response).sum(-1) / response.sum(-1)
        logits = outputs.mean_logits
        found = (
            means[:chosen],
            means[chosen:],
            logits[:chosen][kept[:chosen]],
            logits[chosen:][kept[chosen:]],
            nll,
        )
        return (*found, outputs.aux_loss) if host.aux_loss_enabled else found


class ORPOTrainer(ORPOSlot, HostORPOTrainer):
    r"""TRL's ORPOTrainer without logits, and with a link on its odds-ratio term.

    TRL's loss is the cross entropy of the chosen row plus :math:`\beta(-\log\sigma(x))`, x the log
    odds ratio of the two completions. With `loss` the second term is
    :math:`\beta\,link(-\log\sigma(x))`; `loss="ce"` and None are TRL's own.

    Args:
        model: As TRL's, and so all arguments but those below.
        loss: As `rlo_hf.trl.DPOTrainer`.
        check: As `rlo_hf.trl.DPOTrainer`.
        linear: "auto" computes the loss without logits; `logits/chosen` and `logits/rejected` are
            then means over labelled tokens, where TRL's are over padding too. "off" keeps logits.

    Raises:
        RLOError: as `rlo_hf.trl.DPOTrainer`.
    """
