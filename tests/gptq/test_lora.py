"""Adapters train on top of packed layers, which stay as they are."""

from __future__ import annotations

import pytest
import rlo_gptq
import torch
from rlo_gptq.packed.quant_linear import QuantLinear

peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_train_save_and_reload_over_packed_layers(quantized, tmp_path):
    model = rlo_gptq.load(quantized)
    packed = {n: t.clone() for n, t in model.state_dict().items() if n.endswith(".weight")}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    wrapped = [m for m in tuned.modules() if isinstance(getattr(m, "base_layer", 0), QuantLinear)]
    assert len(wrapped) == 14
    ids = torch.arange(2, 34)[None]
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    tuned.save_pretrained(tmp_path)
    tuned.eval()
    again = peft.PeftModel.from_pretrained(rlo_gptq.load(quantized), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, tuned(ids).logits)
    base = again.unload()
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in packed.items())
