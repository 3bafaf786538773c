"""Run a Hugging Face training script, module or launcher unchanged, with the loss in its slot.

Whatever Trainer it makes, here or in a process of its own, is given the loss when it begins to
train (see `rlo_hf.everywhere`). The script's file is not written. A script without a Trainer (the
`*_no_trainer.py` examples) has the loss in the models that it loads: in its syntax tree, in memory,
each `from_pretrained` of a model is wrapped.
"""

from __future__ import annotations

import ast
import functools
import re
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlo_core.errors import RLOError
from rlo_core.launch import ScriptError, run_script
from rlo_core.registry import create_loss

from rlo_hf.everywhere import reach

_TRAINER = re.compile(r"Trainer$")
_MODEL = re.compile(r"^(AutoModelFor\w+|\w+For[A-Z]\w+|\w+LMHeadModel)$")
_LOADERS = ("from_pretrained", "from_config")


def run_with_loss(
    script: str, argv: Sequence[str], loss: str, *, module: bool = False, check: bool = True
) -> None:
    """Run `python SCRIPT ARGV...` with the loss that a spec names.

    Evaluation reports cross entropy as `eval_loss`: the examples print exp of it as perplexity. The
    objective is in `eval_objective`.

    Args:
        script: A file, or the name of a launcher on the path (`trl`, `llamafactory-cli`).
        argv: Its arguments.
        loss: The spec.
        module: `script` is the name of a module, as for `python -m`.
        check: As `rlo_hf.Trainer`.

    Raises:
        RLOError: a wrong spec, a script that is not there, or a run in which nothing took the loss.
    """
    create_loss(loss)
    models = ModelsGiven()
    with reach(loss, check=check) as reached:
        try:
            if module:
                _run_module(script, argv)
            else:
                transform = functools.partial(with_loss, loss=loss, check=check, models=models)
                run_script(_found(script), argv, transform=transform)
        except SystemExit as done:
            if done.code not in (None, 0):
                raise
        if not reached.trainers and not models.count:
            raise RLOError(
                f"{script} has trained nothing on {loss}: no Trainer of transformers or TRL began "
                "to train in it, and it loaded no model with AutoModelFor....from_pretrained"
            )


def _found(script: str) -> str:
    """Return a script's path; that of a launcher on the path where there is no such file."""
    if Path(script).is_file():
        return script
    launcher = shutil.which(script)
    if launcher is None:
        return script
    with Path(launcher).open("rb") as handle:
        first = handle.readline()
    if b"python" not in first:
        raise ScriptError(f"launcher {script!r} must be a Python script, and {launcher!r} is not")
    return launcher


def _run_module(name: str, argv: Sequence[str]) -> None:
    before = sys.argv
    sys.argv = [name, *argv]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except ImportError as error:
        if error.name not in (None, name):
            raise
        raise ScriptError(f"no module named {name!r} that can be run: {error}") from error
    finally:
        sys.argv = before


class ModelsGiven:
    """Counts the models that a script has loaded and that were given the loss."""

    count = 0


def with_loss(
    tree: ast.Module, *, loss: str, check: bool = True, models: ModelsGiven | None = None
) -> ast.Module:
    """Put the loss in the models of a script that imports no Trainer."""
    for node in ast.walk(tree):
        names = node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if any(_TRAINER.search(alias.name) for alias in names):
            return tree
        if isinstance(node, ast.Attribute) and _TRAINER.search(node.attr):
            return tree
    _GIVEN["models"] = models or ModelsGiven()
    _Models(loss, check).visit(tree)
    return tree


_GIVEN: dict[str, ModelsGiven] = {"models": ModelsGiven()}


def with_model_loss(model: Any, loss: str, check: bool = True) -> Any:
    """Put the loss in a model that a script has loaded.

    A model that cannot take it is refused when it is trained on its own loss: given to a Trainer of
    another file it never is.
    """
    from rlo_hf.model_loss import set_loss

    try:
        set_loss(model, loss, eval_loss="ce", check=check)
    except RLOError as error:
        _refuse_labels(model, error)
    _GIVEN["models"].count += 1
    return model


def _refuse_labels(model: Any, error: RLOError) -> None:
    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        if module.training and kwargs.get("labels") is not None:
            raise error

    model.register_forward_pre_hook(refuse, with_kwargs=True)


class _Models(ast.NodeTransformer):
    """Wraps `AutoModelForCausalLM.from_pretrained(...)` and the like."""

    def __init__(self, loss: str, check: bool) -> None:
        self.loss, self.check = loss, check

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        target = node.func
        if not isinstance(target, ast.Attribute) or target.attr not in _LOADERS:
            return node
        owner = target.value
        name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
        if not _MODEL.match(name):
            return node
        wrapped = _expression(
            "__import__('rlo_hf.script').script.with_model_loss"
            f"(None, {self.loss!r}, {self.check!r})"
        )
        assert isinstance(wrapped, ast.Call)
        wrapped.args[0] = node
        return ast.copy_location(wrapped, node)


def _expression(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body
