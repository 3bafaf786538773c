"""Run a Hugging Face training script unchanged, with the loss put in its slot.

The script's file is not written. In its syntax tree, after each import of a Trainer comes a line
that binds the name to this package's Trainer of the same kind. A script without a Trainer (the
`*_no_trainer.py` examples) gets the loss in its models instead.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Sequence
from typing import Any

from rlo_core.launch import ScriptError, insert_after, run_script
from rlo_core.registry import create_loss

_TRAINERS = {
    "transformers": ("Trainer", "Seq2SeqTrainer"),
    "trl": ("SFTTrainer",),
}
_MODEL = re.compile(r"^(AutoModelFor\w+|\w+For[A-Z]\w+|\w+LMHeadModel)$")
_LOADERS = ("from_pretrained", "from_config")


def run_with_loss(script: str, argv: Sequence[str], loss: str) -> None:
    """Run `python SCRIPT ARGV...` with the loss that a spec names.

    Evaluation reports cross entropy as `eval_loss`: the examples print exp of it as perplexity. The
    objective is in `eval_objective`.

    Raises:
        RLOError: a wrong spec, a script that is not there, or one without a slot.
    """
    create_loss(loss)
    run_script(script, argv, transform=functools.partial(with_loss, loss=loss))


def with_loss(tree: ast.Module, *, loss: str) -> ast.Module:
    """Put the loss in the Trainers of a script, or else in its models.

    Raises:
        ScriptError: the script has neither.
    """
    edit = _Trainers(loss)
    edit.visit(tree)
    if edit.found:
        return tree
    models = _Models(loss)
    models.visit(tree)
    if not models.found:
        raise ScriptError(
            "script must import Trainer, Seq2SeqTrainer or SFTTrainer, or load a model with "
            "AutoModelFor....from_pretrained; this one does neither"
        )
    return tree


def bound_trainer(kind: str, loss: str) -> Any:
    """Return this package's trainer of a kind, with its loss given."""
    if kind == "SFTTrainer":
        from rlo_hf.trl import SFTTrainer

        return _bind(SFTTrainer, loss=loss)
    import rlo_hf

    return _bind(getattr(rlo_hf, kind), loss=loss, eval_loss="ce")


def _bind(trainer: Any, **given: Any) -> Any:
    made = functools.partialmethod(trainer.__init__, **given)
    return type(trainer.__name__, (trainer,), {"__init__": made, "__module__": trainer.__module__})


def with_model_loss(model: Any, loss: str) -> Any:
    """Put the loss in a model that a script has loaded."""
    from rlo_hf.model_loss import set_loss

    return set_loss(model, loss, eval_loss="ce")


class _Trainers(ast.NodeTransformer):
    """Rebinds imported Trainer names, and replaces `transformers.Trainer`."""

    def __init__(self, loss: str) -> None:
        self.loss = loss
        self.found = 0
        self.modules: dict[str, str] = {}

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                for statement in list(body):
                    self._after_import(body, statement)
        return node

    def _after_import(self, body: list[ast.stmt], statement: ast.stmt) -> None:
        if not isinstance(statement, ast.ImportFrom) or statement.module is None:
            return
        kinds = _TRAINERS.get(statement.module.partition(".")[0], ())
        for alias in statement.names:
            if alias.name in kinds:
                self.found += 1
                name = alias.asname or alias.name
                insert_after(body, statement, f"{name} = {self._call(alias.name)}")

    def visit_Import(self, node: ast.Import) -> ast.AST:
        for alias in node.names:
            if alias.name in _TRAINERS:
                self.modules[alias.asname or alias.name] = alias.name
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        module = self.modules.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if module is None or node.attr not in _TRAINERS[module]:
            return node
        self.found += 1
        return ast.copy_location(_expression(self._call(node.attr)), node)

    def _call(self, kind: str) -> str:
        return f"__import__('rlo_hf.script').script.bound_trainer({kind!r}, {self.loss!r})"


class _Models(ast.NodeTransformer):
    """Wraps `AutoModelForCausalLM.from_pretrained(...)` and the like."""

    def __init__(self, loss: str) -> None:
        self.loss = loss
        self.found = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        target = node.func
        if not isinstance(target, ast.Attribute) or target.attr not in _LOADERS:
            return node
        owner = target.value
        name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
        if not _MODEL.match(name):
            return node
        self.found += 1
        wrapped = _expression(
            f"__import__('rlo_hf.script').script.with_model_loss(None, {self.loss!r})"
        )
        assert isinstance(wrapped, ast.Call)
        wrapped.args[0] = node
        return ast.copy_location(wrapped, node)


def _expression(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body
