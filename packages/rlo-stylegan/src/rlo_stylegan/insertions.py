"""What a codemod puts into a tree, in the layout that is there already."""

from __future__ import annotations

import libcst as cst


def statement(text: str, module: cst.Module) -> cst.SimpleStatementLine:
    """Return one statement in the line ends and indentation of `module`."""
    parsed = cst.parse_statement(text, config=module.config_for_parsing)
    if not isinstance(parsed, cst.SimpleStatementLine):
        raise TypeError(f"statement must be a simple one, got {text!r}")
    return parsed


def add_parameter(parameters: cst.Parameters, name: str, default: str) -> cst.Parameters:
    """Return the parameters with `name=default` after the last positional one, laid out alike."""
    *before, last = parameters.params
    space = before[-1].comma if before else cst.MaybeSentinel.DEFAULT
    plain = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    trailing = last.comma
    first = last
    if isinstance(trailing, cst.Comma) and isinstance(
        trailing.whitespace_after, cst.ParenthesizedWhitespace
    ):
        # One parameter a line: its comment stays with it, and the new one gets a line like it.
        indent = space.whitespace_after if isinstance(space, cst.Comma) else None
        inner = trailing.whitespace_after
        if isinstance(indent, cst.ParenthesizedWhitespace):
            first = last.with_changes(
                comma=trailing.with_changes(
                    whitespace_after=inner.with_changes(
                        indent=indent.indent, last_line=indent.last_line
                    )
                )
            )
        trailing = trailing.with_changes(
            whitespace_after=inner.with_changes(
                first_line=inner.first_line.with_changes(
                    whitespace=cst.SimpleWhitespace(""), comment=None
                ),
                empty_lines=[],
            )
        )
    elif not isinstance(trailing, cst.Comma):
        first = last.with_changes(comma=plain)
    added = cst.Param(
        name=cst.Name(name),
        equal=cst.AssignEqual(
            whitespace_before=cst.SimpleWhitespace(""), whitespace_after=cst.SimpleWhitespace("")
        ),
        default=cst.parse_expression(default),
        comma=trailing,
    )
    return parameters.with_changes(params=[*before, first, added])


def add_import(module: cst.Module, line: str) -> cst.Module:
    """Return the module with one import after its last top-level one."""
    body = list(module.body)
    places = [
        i
        for i, node in enumerate(body)
        if isinstance(node, cst.SimpleStatementLine)
        and isinstance(node.body[0], (cst.Import, cst.ImportFrom))
    ]
    body.insert(places[-1] + 1 if places else 0, statement(line, module))
    return module.with_changes(body=body)
