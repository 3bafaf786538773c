"""The shape of timm's train.py, from v0.2.1 to today, and where our statements go.

Names in it never changed: a module-level `parser`, `args = parser.parse_args(...)`, `def main()`,
and inside it `train_loss_fn`, `validate_loss_fn` or `task`. Six statements are injected:

    before the first top-level def after `parser = ...`   make the slot, add the options
    after `args = parser.parse_args(...)`                 check the spec, before anything is built
    before `validate_loss_fn = ...` in main()             replace `train_loss_fn`
        or, where there is none, after `task = ...Task()`     replace its criterion
    first in main()'s `for epoch in ...`                  tell the epoch    (schedules)
    first in the training function's `for batch_idx, ...` tell the batch    (schedules)
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from rlo_core.launch import ScriptError, assigns, function, insert_after, insert_before, statements

SLOT = "_rlo_timm"
"""The name of the slot among the script's globals."""

_KNOWN = "rlo-timm knows timm's train.py from v0.2.1 on"


def transform(tree: ast.Module) -> ast.Module:
    """Open the loss slot of a train.py.

    Raises:
        ScriptError: the shape is not that of a train.py; says what was looked for.
    """
    missing: list[str] = []
    parser = _parser(tree)
    parse = _parse_args(tree)
    main = function(tree, "main")
    if parser is None:
        missing.append("`parser = ...ArgumentParser(...)` and a def after it, at the top level")
    if parse is None:
        missing.append("`args = parser.parse_args(...)` in _parse_args() or main()")
    if main is None:
        missing.append("`def main()`")
    criterion = None if main is None else _criterion(main)
    if main is not None and criterion is None:
        missing.append(
            "one `validate_loss_fn = ...` after `train_loss_fn = ...`, or one "
            "`task = ...Task(...)`, at the top level of main()"
        )
    if parser is None or parse is None or main is None or criterion is None:
        raise ScriptError(f"not a train.py: looked for {'; and for '.join(missing)} ({_KNOWN})")
    progress = _open_progress(tree, main)
    insert_before(
        tree.body,
        parser,
        f"import rlo_timm.launcher.slot as {SLOT}\n"
        f"{SLOT} = {SLOT}.Slot(progress={progress}, found={criterion.where!r})\n"
        f"{SLOT}.add_options(parser)\n",
    )
    insert_after(parse.body, parse.statement, f"{SLOT}.check(parser, args)")
    if criterion.before:
        source = f"train_loss_fn = {SLOT}.criterion(train_loss_fn, args)"
        insert_before(main.body, criterion.statement, source)
    else:
        insert_after(main.body, criterion.statement, f"{SLOT}.task(task, args)")
    return tree


def _parser(tree: ast.Module) -> ast.stmt | None:
    """Return the first top-level def after the last `parser = ...`: the options are all there."""
    made = [i for i, node in enumerate(tree.body) if assigns(node, "parser")]
    after = tree.body[made[-1] :] if made else []
    return next((node for node in after if isinstance(node, ast.FunctionDef)), None)


@dataclass(frozen=True)
class _Anchor:
    """A statement, the block that it is in, and on which side of it we go."""

    statement: ast.stmt
    body: list[ast.stmt]
    before: bool = False

    @property
    def where(self) -> str:
        """Return which statement it is, in words."""
        side, what = ("before", "validate_loss_fn") if self.before else ("after", "task")
        return f"{side} `{what} = ...` in main(), line {self.statement.lineno}"


def _parse_args(tree: ast.Module) -> _Anchor | None:
    for name in ("_parse_args", "parse_args", "main"):
        owner = function(tree, name)
        if owner is None:
            continue
        for body in _blocks(owner.body):
            for node in body:
                if assigns(node, "args") and _calls(node, "parse_args"):
                    return _Anchor(node, body)
    return None


def _blocks(body: list[ast.stmt]) -> Iterator[list[ast.stmt]]:
    """Yield a block and those nested in it, but not inside other functions."""
    yield body
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        for field in ("body", "orelse", "finalbody"):
            nested = getattr(node, field, None)
            if nested:
                yield from _blocks(nested)
        for handler in getattr(node, "handlers", ()):
            yield from _blocks(handler.body)


def _calls(node: ast.stmt, suffix: str) -> bool:
    """Tell whether the value assigned is a call of a name or attribute ending in `suffix`."""
    value = getattr(node, "value", None)
    if not isinstance(value, ast.Call):
        return False
    called = value.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return bool(name.endswith(suffix))


def _criterion(main: ast.FunctionDef) -> _Anchor | None:
    """Return where every branch has chosen its training loss, or None."""
    nested = [node for body in _blocks(main.body) for node in body]
    trains = any(assigns(node, "train_loss_fn") for node in nested)
    validates = [node for node in nested if assigns(node, "validate_loss_fn")]
    if trains and len(validates) == 1 and any(validates[0] is node for node in main.body):
        return _Anchor(validates[0], main.body, before=True)
    if trains and validates:
        return None
    for node in reversed(main.body):
        inside = [n for body in _blocks([node]) for n in body]
        if any(assigns(n, "task") and _calls(n, "Task") for n in inside):
            return _Anchor(node, main.body)
    return None


def _open_progress(tree: ast.Module, main: ast.FunctionDef) -> bool:
    """Have the epoch and batch loops tell the slot where they are; False where there are none."""
    epochs = [
        node
        for body in _blocks(main.body)
        for node in body
        if isinstance(node, ast.For) and getattr(node.target, "id", None) == "epoch"
    ]
    trainer = function(tree, "train_one_epoch", "train_epoch")
    batches = [
        node
        for body in (_blocks(trainer.body) if trainer else ())
        for node in body
        if isinstance(node, ast.For) and _batch_loop(node)
    ]
    if len(epochs) != 1 or len(batches) != 1 or not _stop(epochs[0]):
        return False
    stop = ast.unparse(_stop(epochs[0]))  # type: ignore[arg-type]
    epochs[0].body[:0] = statements(f"{SLOT}.epoch(epoch, {stop})", like=epochs[0].body[0])
    batches[0].body[:0] = statements(
        f"{SLOT}.batch(batch_idx, len(loader))", like=batches[0].body[0]
    )
    return True


def _stop(loop: ast.For) -> ast.expr | None:
    """Return the end of `range(start, end)`."""
    call = loop.iter
    if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "range":
        return call.args[1] if len(call.args) > 1 else call.args[0]
    return None


def _batch_loop(loop: ast.For) -> bool:
    """Tell whether a loop is `for batch_idx, ... in enumerate(loader)`."""
    target, call = loop.target, loop.iter
    return (
        isinstance(target, ast.Tuple)
        and getattr(target.elts[0], "id", None) == "batch_idx"
        and isinstance(call, ast.Call)
        and getattr(call.func, "id", None) == "enumerate"
        and len(call.args) == 1
        and getattr(call.args[0], "id", None) == "loader"
    )
