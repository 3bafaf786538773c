"""The three softplus terms of a checkout's loss class, found by name and sent through `GanLoss`.

In the method `accumulate_gradients` the generator's term is softplus(-logits), the discriminator's
are softplus(logits) on generated and softplus(-logits) on real images. Any other number or shape of
them is refused: half a loss must not be replaced. Softplus elsewhere (an activation, a ray marcher)
stays.
"""

# ruff: noqa: N802  (libcst finds a visitor by the name of the node class)
from __future__ import annotations

import re
from dataclasses import dataclass, field

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider

from rlo_stylegan.checkout import LOSS, SCRIPT, Checkout, dotted, parse
from rlo_stylegan.errors import CheckoutError
from rlo_stylegan.insertions import add_import, add_parameter, statement

METHOD = "accumulate_gradients"
LOOKED_FOR = (
    f"looked in {METHOD} for three terms, softplus(-logits) of the generator and softplus(logits) "
    "and softplus(-logits) of the discriminator"
)


@dataclass
class Terms:
    """What was found: `line -> text` of every softplus call, and the role of those that count."""

    calls: dict[int, str] = field(default_factory=dict)
    roles: list[str] = field(default_factory=list)


def loss_class(script: bytes) -> str:
    """Return the name of the class of `training/loss.py` that `train.py` names in a string.

    Raises:
        CheckoutError: it names none, or several.
    """
    text = script.decode("utf-8", errors="replace")
    names: list[str] = sorted(set(re.findall(r"""['"]training\.loss\.(\w+)['"]""", text)))
    if len(names) != 1:
        found = ", ".join(names) if names else "none"
        raise CheckoutError(
            f"{SCRIPT} must name one class of {LOSS} as 'training.loss.NAME', found {found}"
        )
    return names[0]


def _logits(call: cst.Call) -> tuple[bool, str] | None:
    """Return (negated, name) for softplus(name) and softplus(-name), None for any other call."""
    if len(call.args) != 1 or call.args[0].keyword is not None or call.args[0].star:
        return None
    value = call.args[0].value
    negated = isinstance(value, cst.UnaryOperation) and isinstance(value.operator, cst.Minus)
    if isinstance(value, cst.UnaryOperation) and negated:
        value = value.expression
    return (negated, value.value) if isinstance(value, cst.Name) else None


class _Sites(cst.CSTTransformer):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner
        self.terms = Terms()
        self.seen_class = False
        self._inside: list[str] = []
        self._self = ""

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self._inside.append(node.name.value)
        self.seen_class |= self._inside == [self.owner]

    def leave_ClassDef(
        self, original_node: cst.ClassDef, updated_node: cst.ClassDef
    ) -> cst.ClassDef:
        self._inside.pop()
        return updated_node

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self._inside.append(node.name.value)
        if self._inside == [self.owner, METHOD] and node.params.params:
            self._self = node.params.params[0].name.value

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        self._inside.pop()
        return updated_node

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if dotted(original_node.func).rpartition(".")[2] != "softplus":
            return updated_node
        if self._inside != [self.owner, METHOD]:
            return updated_node
        line = self.get_metadata(PositionProvider, original_node).start.line
        self.terms.calls[line] = cst.Module([]).code_for_node(original_node)
        logits = _logits(original_node)
        if logits is None:
            self.terms.roles.append("?")
            return updated_node
        negated, name = logits
        role = "D_fake" if not negated else "D_real" if "real" in name else "G"
        self.terms.roles.append(role)
        (argument,) = updated_node.args
        comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
        return updated_node.with_changes(
            func=cst.Attribute(cst.Name(self._self), cst.Name("gan_loss")),
            args=[argument.with_changes(comma=comma), cst.Arg(cst.SimpleString(f"'{role}'"))],
        )


def replace_terms(source: bytes, owner: str, *, name: str = LOSS) -> tuple[cst.Module, Terms]:
    """Return the tree of `training/loss.py` with its three terms replaced, no line moved.

    Args:
        source: The file.
        owner: The name of the loss class.
        name: How messages call the file.

    Raises:
        CheckoutError: no such class, or not the three terms.
    """
    if b"rlo_stylegan" in source:
        raise CheckoutError(
            f"{name} names rlo_stylegan, but no apply is on record; restore the file first"
        )
    sites = _Sites(owner)
    module = MetadataWrapper(parse(source, name), unsafe_skip_copy=True).visit(sites)
    if not sites.seen_class:
        raise CheckoutError(f"{name} has no class {owner!r}, which {SCRIPT} names")
    if sorted(sites.terms.roles) != ["D_fake", "D_real", "G"]:
        calls = [f"line {line}: {text}" for line, text in sites.terms.calls.items()]
        found = "; ".join(calls) if calls else "no softplus"
        raise CheckoutError(f"{name} is not understood: {LOOKED_FOR}; found {found}")
    return module, sites.terms


class _Wire(cst.CSTTransformer):
    """Give the class its option and its criterion."""

    def __init__(self, owner: str, module: cst.Module, report: str | None) -> None:
        super().__init__()
        self.owner, self.module, self.report = owner, module, report
        self.wired = False
        self._inside: list[str] = []

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self._inside.append(node.name.value)

    def leave_ClassDef(
        self, original_node: cst.ClassDef, updated_node: cst.ClassDef
    ) -> cst.ClassDef:
        self._inside.pop()
        return updated_node

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self._inside.append(node.name.value)

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        inside = list(self._inside)
        self._inside.pop()
        if inside != [self.owner, "__init__"] or not isinstance(
            updated_node.body, cst.IndentedBlock
        ):
            return updated_node
        self.wired = True
        this = updated_node.params.params[0].name.value
        told = f", report={self.report}" if self.report else ""
        line = statement(f"{this}.gan_loss = GanLoss(gan_loss{told})", self.module)
        body = [*updated_node.body.body, line]
        return updated_node.with_changes(
            params=add_parameter(updated_node.params, "gan_loss", "'ce'"),
            body=updated_node.body.with_changes(body=body),
        )


def patch_loss(checkout: Checkout, source: bytes, script: bytes) -> bytes:
    """Return `training/loss.py` with its terms going through `GanLoss`.

    Raises:
        CheckoutError: as `replace_terms`, and for a class without an `__init__` of its own.
    """
    owner = loss_class(script)
    module, _ = replace_terms(source, owner)
    report = "training_stats.report" if b"import training_stats" in source else None
    wire = _Wire(owner, module, report)
    module = module.visit(wire)
    if not wire.wired:
        raise CheckoutError(
            f"class {owner!r} of {LOSS} has no __init__ of its own to take the loss"
        )
    return add_import(module, "from rlo_stylegan.criterion import GanLoss").bytes
