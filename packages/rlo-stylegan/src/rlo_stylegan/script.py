"""A checkout's `train.py`: where the options come in and where they become `loss_kwargs`.

Three shapes are known, told apart by structure and not by the name of a repository:

- forwarded: a click command hands its options on as `F(**options)`, and F assigns `x.loss_kwargs`
  (the stylegan2-ada family);
- collected: the click command takes `**kwargs` and assigns `x.loss_kwargs` itself (stylegan3
  family);
- argparse: a function returns an ArgumentParser, and its arguments reach F as `F(**vars(args))`.
"""

# ruff: noqa: N802  (libcst finds a visitor by the name of the node class)
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import libcst as cst
import libcst.matchers as match

from rlo_stylegan.checkout import SCRIPT, dotted, parse
from rlo_stylegan.errors import CheckoutError
from rlo_stylegan.flags import OPTIONS
from rlo_stylegan.insertions import add_import, add_parameter, statement

Shape = Literal["forwarded", "collected", "argparse"]


@dataclass(frozen=True)
class Script:
    """The structure of a train.py.

    Args:
        shape: Which of the three shapes.
        command: The function with the options: the click command, or the one that returns the
            parser.
        setup: The function that assigns `loss_kwargs`.
        options: The name of the command's `**options` (collected), or of the parser (argparse).
    """

    shape: Shape
    command: str
    setup: str
    options: str


def _is_loss_kwargs(node: cst.CSTNode) -> bool:
    """Tell whether a statement is `x.loss_kwargs = ...`."""
    return match.matches(
        node,
        match.SimpleStatementLine(
            body=[
                match.Assign(
                    targets=[
                        match.AssignTarget(target=match.Attribute(attr=match.Name("loss_kwargs")))
                    ]
                )
            ]
        ),
    )


def _click_command(function: cst.FunctionDef) -> bool:
    return any(
        isinstance(d.decorator, cst.Call) and dotted(d.decorator.func) == "click.command"
        for d in function.decorators
    )


def _parser_name(function: cst.FunctionDef) -> str | None:
    """Return the name of the ArgumentParser that a function makes and returns."""
    made = match.findall(
        function,
        match.Assign(
            targets=[match.AssignTarget(target=match.Name())],
            value=match.Call(func=match.Attribute(attr=match.Name("ArgumentParser"))),
        ),
    )
    for node in made:
        assert isinstance(node, cst.Assign)
        target = node.targets[0].target
        if isinstance(target, cst.Name) and match.findall(
            function.body, match.Return(value=match.Name(target.value))
        ):
            return target.value
    return None


def _handed_on(caller: cst.FunctionDef, name: str, *, through_vars: bool) -> bool:
    """Tell whether `caller` calls `name(**x)`, or `name(**vars(x))`."""
    value: match.BaseExpressionMatchType = (
        match.Call(func=match.Name("vars")) if through_vars else match.Name()
    )
    call = match.Call(func=match.Name(name), args=[match.Arg(star="**", value=value)])
    return bool(match.findall(caller, call))


def read_script(source: bytes) -> Script:
    """Return the structure of a train.py.

    Raises:
        CheckoutError: it has none of the known shapes, or has options of these names.
    """
    module = parse(source, SCRIPT)
    functions = [node for node in module.body if isinstance(node, cst.FunctionDef)]
    setups = [f for f in functions for node in f.body.body if _is_loss_kwargs(node)]
    commands = [f for f in functions if _click_command(f)]
    parsers = [(f, name) for f in functions if (name := _parser_name(f)) is not None]
    _refuse_taken(source)
    looked = (
        f"{SCRIPT} is not understood: looked for one assignment x.loss_kwargs = ... at the top "
        "level of a function that a click command or an argparse main calls with all its options"
    )
    if len(setups) != 1:
        found = ", ".join(f.name.value for f in setups) if setups else "none"
        raise CheckoutError(f"{looked}; found {found}")
    setup = setups[0]
    for command in commands:
        star = command.params.star_kwarg
        if star is None:
            continue
        if command is setup:
            return Script("collected", setup.name.value, setup.name.value, star.name.value)
        if _handed_on(command, setup.name.value, through_vars=False) and setup.params.params:
            return Script("forwarded", command.name.value, setup.name.value, star.name.value)
    handed = [f for f in functions if _handed_on(f, setup.name.value, through_vars=True)]
    if len(parsers) == 1 and handed and setup.params.params:
        return Script("argparse", parsers[0][0].name.value, setup.name.value, parsers[0][1])
    raise CheckoutError(
        f"{looked}; found it in {setup.name.value}(), and {len(commands)} click commands and "
        f"{len(parsers)} argument parsers, none of which hands it all its options"
    )


def _refuse_taken(source: bytes) -> None:
    if b"rlo_stylegan" in source:
        raise CheckoutError(
            f"{SCRIPT} names rlo_stylegan, but no apply is on record; restore the file first"
        )
    taken = [
        flag
        for flag, _ in OPTIONS
        if f"'{flag}'".encode() in source or f'"{flag}"'.encode() in source
    ]
    if taken:
        raise CheckoutError(
            f"{SCRIPT} has an option {taken[0]} of its own; a checkout that was patched by hand "
            "for another loss has to be restored first"
        )


class _Options(cst.CSTTransformer):
    def __init__(self, script: Script, module: cst.Module) -> None:
        super().__init__()
        self.script, self.module = script, module
        self._inside: list[str] = []

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self._inside.append(node.name.value)

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        top = len(self._inside) == 1
        name = self._inside.pop()
        if not top:
            return updated_node
        node = updated_node
        if name == self.script.setup:
            node = self._forward(node)
        if name == self.script.command:
            node = self._argument(node) if self.script.shape == "argparse" else self._decorate(node)
        return node

    def _forward(self, node: cst.FunctionDef) -> cst.FunctionDef:
        """Add the parameters, and hand their values to `loss_kwargs`."""
        names = [flag.lstrip("-") for flag, _ in OPTIONS]
        if self.script.shape == "collected":
            values = [f"{self.script.options}[{name!r}]" for name in names]
        else:
            values = names
            parameters = node.params
            for name in names:
                default = "'ce'" if name == "loss" else "None"
                parameters = add_parameter(parameters, name, default)
            node = node.with_changes(params=parameters)
        body: list[cst.BaseStatement | cst.BaseSmallStatement] = []
        for line in node.body.body:
            body.append(line)
            if _is_loss_kwargs(line):
                assert isinstance(line, cst.SimpleStatementLine)
                assignment = line.body[0]
                assert isinstance(assignment, cst.Assign)
                target = self.module.code_for_node(assignment.targets[0].target)
                text = f"{target}.update(gan_loss_kwargs({', '.join(values)}))"
                body.append(statement(text, self.module))
        return node.with_changes(body=node.body.with_changes(body=body))

    def _decorate(self, node: cst.FunctionDef) -> cst.FunctionDef:
        """Add the click options after the last one."""
        added = []
        for flag, text in OPTIONS:
            kind = "type=str, default='ce', show_default=True" if flag == "--loss" else "type=float"
            metavar = "SPEC" if flag == "--loss" else "FLOAT"
            call = f"click.option('{flag}', help={text!r}, metavar='{metavar}', {kind})"
            added.append(cst.Decorator(cst.parse_expression(call), leading_lines=[]))
        return node.with_changes(decorators=[*node.decorators, *added])

    def _argument(self, node: cst.FunctionDef) -> cst.FunctionDef:
        """Add the arguments before the parser is returned."""
        body: list[cst.BaseStatement | cst.BaseSmallStatement] = []
        for line in node.body.body:
            if match.matches(line, match.SimpleStatementLine(body=[match.Return()])):
                for flag, text in OPTIONS:
                    kind = "type=str, default='ce'" if flag == "--loss" else "type=float"
                    call = f"{self.script.options}.add_argument('{flag}', help={text!r}, {kind})"
                    body.append(statement(call, self.module))
            body.append(line)
        return node.with_changes(body=node.body.with_changes(body=body))


def patch_script(source: bytes) -> bytes:
    """Return `train.py` with the options, handed to the loss class.

    Raises:
        CheckoutError: as `read_script`.
    """
    script = read_script(source)
    module = parse(source, SCRIPT)
    module = module.visit(_Options(script, module))
    return add_import(module, "from rlo_stylegan.flags import gan_loss_kwargs").bytes
