"""Repairs for what torch has changed under a training loop."""

# ruff: noqa: N802  (libcst finds a visitor by the name of the node class)
from __future__ import annotations

import inspect
import re
from pathlib import Path

import libcst as cst
import libcst.matchers as match

from rlo_stylegan.checkout import dotted
from rlo_stylegan.insertions import statement
from rlo_stylegan.repairs.base import Repair


class SamplerArgument(Repair):
    """`super().__init__(dataset)` of a Sampler: torch's base class takes no argument any more."""

    title = "sampler"
    why = "torch.utils.data.Sampler takes no data set any more: training stops with a TypeError"
    pattern = re.compile(rb"class\s+\w+\([\w.]*Sampler\)")
    _inside = 0

    @staticmethod
    def needed() -> bool:
        from torch.utils.data import Sampler

        return Sampler.__init__ is object.__init__

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self._inside += any(dotted(base.value).endswith("Sampler") for base in node.bases)

    def leave_ClassDef(
        self, original_node: cst.ClassDef, updated_node: cst.ClassDef
    ) -> cst.ClassDef:
        self._inside -= any(dotted(base.value).endswith("Sampler") for base in original_node.bases)
        return updated_node

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        parent = match.Call(
            func=match.Attribute(
                value=match.Call(func=match.Name("super")), attr=match.Name("__init__")
            ),
            args=[match.AtLeastN(n=1)],
        )
        if not self._inside or not match.matches(original_node, parent):
            return updated_node
        self.note(original_node)
        return updated_node.with_changes(args=[])


class PluginModule(Repair):
    """A compiled plugin from `cpp_extension.load` itself, and not from an import by name after."""

    title = "custom-ops"
    level = "slow"
    why = (
        "plugins that torch builds now are not in sys.modules afterwards: the import fails and "
        "slow reference code runs instead"
    )
    pattern = re.compile(rb"cpp_extension\.load\(")
    _target = ""

    @staticmethod
    def needed() -> bool:
        import torch

        # Since pybind11 3 modules are initialised in two phases: they do not enter sys.modules.
        header = Path(torch.__file__).parent / "include" / "pybind11" / "detail" / "common.h"
        if not header.is_file():
            return True
        found = re.search(
            r"define PYBIND11_VERSION_MAJOR (\d+)", header.read_text(errors="replace")
        )
        return found is None or int(found[1]) >= 3

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        by_name = match.Assign(
            targets=[match.AssignTarget(target=match.Name())],
            value=match.Call(func=match.Attribute(attr=match.Name("import_module"))),
        )
        builds = match.Call(func=match.Attribute(attr=match.Name("load")))
        found = [n for n in match.findall(node, by_name) if isinstance(n, cst.Assign)]
        both = len(found) == 1 and match.findall(node, builds)
        target = found[0].targets[0].target if both else None
        self._target = target.value if isinstance(target, cst.Name) else ""

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        self._target = ""
        return updated_node

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.RemovalSentinel:
        if not self._target or len(original_node.body) != 1:
            return updated_node
        small = original_node.body[0]
        if (
            isinstance(small, cst.Expr)
            and isinstance(small.value, cst.Call)
            and dotted(small.value.func).endswith("cpp_extension.load")
        ):
            self.note(original_node)
            assign = cst.Assign([cst.AssignTarget(cst.Name(self._target))], small.value)
            return updated_node.with_changes(body=[assign])
        if isinstance(small, cst.Assign) and match.matches(
            small.value, match.Call(func=match.Attribute(attr=match.Name("import_module")))
        ):
            self.note(original_node)
            return cst.RemoveFromParent()
        return updated_node


class AdamBetas(Repair):
    """`betas=[0, 0.99]` as `[0.0, 0.99]`: Adam wants floats now."""

    title = "adam"
    why = (
        "torch.optim.Adam refuses an integer in betas: ValueError for a network without lazy "
        "regularization (stylegan3-t and stylegan3-r)"
    )
    pattern = re.compile(rb"betas\s*=\s*[\[(]")

    @staticmethod
    def needed() -> bool:
        import torch

        try:
            torch.optim.Adam([torch.zeros(1, requires_grad=True)], betas=(0, 0.99))
        except ValueError:
            return True
        return False

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
        value = updated_node.value
        if original_node.keyword is None or original_node.keyword.value != "betas":
            return updated_node
        if not isinstance(value, (cst.List, cst.Tuple)):
            return updated_node
        if not any(isinstance(element.value, cst.Integer) for element in value.elements):
            return updated_node
        self.note(original_node)
        elements = [
            e.with_changes(value=cst.Float(f"{e.value.value}.0"))
            if isinstance(e.value, cst.Integer)
            else e
            for e in value.elements
        ]
        return updated_node.with_changes(value=value.with_changes(elements=elements))


class SharedBuffers(Repair):
    """Buffers from rank 0 before DistributedDataParallel: it leaves them alone where told to."""

    title = "ddp"
    level = "note"
    why = (
        "with broadcast_buffers=False torch does not share buffers at the start any more: several "
        "GPUs stop at the first snapshot (noise_const differs between ranks)"
    )
    pattern = re.compile(rb"broadcast_buffers\s*=\s*False")
    _shares = False

    @staticmethod
    def needed() -> bool:
        from torch.nn.parallel import DistributedDataParallel

        return "init_sync" in inspect.signature(DistributedDataParallel).parameters

    def visit_Module(self, node: cst.Module) -> None:
        self._shares = "distributed.broadcast(" in node.code

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.BaseStatement]:
        without = match.Arg(keyword=match.Name("broadcast_buffers"), value=match.Name("False"))
        wrapped = match.SimpleStatementLine(
            body=[
                match.Assign(
                    value=match.Call(
                        func=match.Attribute(attr=match.Name("DistributedDataParallel")),
                        args=[
                            match.Arg(value=match.Name(), keyword=None),
                            match.ZeroOrMore(),
                            without,
                            match.ZeroOrMore(),
                        ],
                    )
                )
            ]
        )
        if self._shares or not match.matches(original_node, wrapped):
            return updated_node
        assignment = original_node.body[0]
        assert isinstance(assignment, cst.Assign)
        assert isinstance(assignment.value, cst.Call)
        self.note(original_node)
        name = dotted(assignment.value.args[0].value)
        loop = cst.For(
            target=cst.Name("buffer"),
            iter=cst.parse_expression(f"{name}.buffers()"),
            body=cst.IndentedBlock(
                [statement("torch.distributed.broadcast(buffer, src=0)", self.module)]
            ),
            leading_lines=updated_node.leading_lines,
        )
        return cst.FlattenSentinel([loop, updated_node.with_changes(leading_lines=[])])
