"""The plug points of ms-swift, Axolotl and torchtitan, on stand-ins of them."""

import subprocess
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from rlo_core.errors import RLOError, SpecError
from rlo_core.functional import rooted_loss


def module(monkeypatch, name, **names):
    """Put a module of a framework that is not installed where an import finds it."""
    made = types.ModuleType(name)
    vars(made).update(names)
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def fresh(monkeypatch):
    """Import an adapter anew, beside a stand-in."""

    def of(name):
        import importlib

        monkeypatch.delitem(sys.modules, f"rlo_hf.{name}", raising=False)
        made = importlib.import_module(f"rlo_hf.{name}")
        monkeypatch.delitem(sys.modules, f"rlo_hf.{name}", raising=False)
        return made

    return of


def test_swift_looks_the_spec_of_its_command_line_up(monkeypatch, fresh):
    own = object()
    table = {"cross_entropy": own}
    module(monkeypatch, "swift.loss", loss_map=table)
    monkeypatch.setattr(sys, "argv", ["swift", "sft", "--loss_type", "rlo:k=5"])
    adapter = fresh("swift")
    assert table["cross_entropy"] is own
    assert {"rlo", "dft", "rlo:k=5"} <= set(table)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 11, generator=g)
    labels = torch.randint(11, (2, 6), generator=g)
    labels[0, :3] = -100
    outputs = types.SimpleNamespace(logits=logits)
    loss = table["rlo:k=5"](None, types.SimpleNamespace(template=None))
    rows = rooted_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), k=5, reduction="none")
    kept = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(loss(outputs, labels), rows.sum() / kept)
    torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=40), rows.sum() / 40)
    scale = torch.rand(2, 6, generator=g)
    weighted = (rows.view(2, 5) * scale[:, :-1]).sum() / 40
    got = loss(outputs, labels, num_items_in_batch=40, loss_scale=scale.view(-1))
    torch.testing.assert_close(got, weighted)
    with pytest.raises(SpecError, match=r"^unknown loss 'rol'"):
        adapter.register(table, ["--loss_type=rol"])
    parallel = types.SimpleNamespace(template=types.SimpleNamespace(sequence_parallel_size=2))
    with pytest.raises(RLOError, match=r"^under ms-swift's sequence parallelism the loss is comp"):
        table["rlo"](None, parallel)


def test_the_file_for_swift_is_printed():
    done = subprocess.run(
        [sys.executable, "-m", "rlo_hf.swift"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("swift.py")


def test_axolotl_gives_its_trainer_the_loss_of_its_yaml(tmp_path, hf, monkeypatch, fresh):
    import transformers

    module(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    adapter = fresh("axolotl")
    plugin = adapter.RLOPlugin()
    assert plugin.get_input_args() == "rlo_hf.axolotl.LossArgs"
    assert adapter.LossArgs(loss="rlo:k=5").loss == "rlo:k=5"
    with pytest.raises(SpecError, match=r"^unknown loss 'rol'"):
        plugin.register({"loss": "rol"})
    rows, grab = hf.examples("llama"), hf.GrabGradients()
    args = hf.arguments(tmp_path)
    trainer = transformers.Trainer(hf.build("llama"), args, hf.collate, rows, callbacks=[grab])
    plugin.post_trainer_create(types.SimpleNamespace(loss="rlo:k=5"), trainer)
    trainer.train()
    assert hf.relative_error(grab.value, hf.expected_gradient("llama", rows, 5.0)) < 3e-6
    other = transformers.Trainer(hf.build("llama"), args, hf.collate, rows)
    plugin.post_trainer_create(types.SimpleNamespace(loss=None), other)
    assert not hasattr(other, "open_slot")


def test_torchtitan_sums_the_loss_over_tokens(monkeypatch, fresh):
    class BaseLoss:
        @dataclass(kw_only=True, slots=True)
        class Config:
            pass

        def _maybe_compile(self, compile_config):
            self.compiled = compile_config

    module(monkeypatch, "torchtitan.components.loss", BaseLoss=BaseLoss)
    adapter = fresh("torchtitan")
    loss = adapter.RootedLoss(adapter.RootedLoss.Config(spec="rlo:k=5"))
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 6, 11, generator=g), torch.randint(11, (2, 6), generator=g)
    labels[1, :4] = -100
    expected = rooted_loss(logits.flatten(0, 1), labels.flatten(), k=5, reduction="sum")
    torch.testing.assert_close(loss.fn(logits, labels), expected)


def test_llamafactory_needs_a_loss():
    from rlo_hf.llamafactory import main

    with pytest.raises(RLOError, match=r"^--loss SPEC is missing; without it, run llamafactory"):
        main(["train", "x.yaml"])
