"""The repairs of the layer `compat`: what each looks for and what it makes of it."""

# ruff: noqa: N802  (libcst finds a visitor by the name of the node class)
from __future__ import annotations

import inspect
import re
from abc import abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import libcst as cst
import libcst.matchers as match
import numpy
from libcst.metadata import PositionProvider

from rlo_stylegan.checkout import dotted, statement

NUMPY_NAMES = {
    **{name: name for name in ("float", "int", "bool", "object", "complex", "str")},
    "long": "int",
    "unicode": "str",
    **{"float_": "np.float64", "complex_": "np.complex128", "unicode_": "np.str_"},
    **{"Inf": "np.inf", "Infinity": "np.inf", "infty": "np.inf", "NaN": "np.nan", "NAN": "np.nan"},
    **{"product": "np.prod", "cumproduct": "np.cumprod", "sometrue": "np.any", "alltrue": "np.all"},
    **{"in1d": "np.isin", "trapz": "np.trapezoid", "row_stack": "np.vstack", "round_": "np.round"},
}
"""Names that NumPy had at some time, and what else they are called."""
# np.bool and np.long are back since NumPy 2, so the installed one decides.
NUMPY_ALIASES = {name: new for name, new in NUMPY_NAMES.items() if name not in vars(numpy)}
PILLOW_ALIASES = {"ANTIALIAS": "LANCZOS", "LINEAR": "BILINEAR", "CUBIC": "BICUBIC"}


Level = Literal["stops", "slow", "note"]
"""What a thing does to a training run: stops it, makes it slow, or neither."""


class Repair(cst.CSTTransformer):
    """A codemod of one module that notes the lines that it changed."""

    METADATA_DEPENDENCIES = (PositionProvider,)
    title: ClassVar[str]
    why: ClassVar[str]
    level: ClassVar[Level] = "stops"
    pattern: ClassVar[re.Pattern[bytes]]
    """A file without it needs no look: building a syntax tree takes a second for a long one."""

    def __init__(self, module: cst.Module) -> None:
        super().__init__()
        self.module = module
        self.lines: list[int] = []

    @staticmethod
    @abstractmethod
    def needed() -> bool:
        """Tell whether the installed packages call for it."""

    def note(self, node: cst.CSTNode) -> None:
        """Remember the line of a node of the original tree."""
        self.lines.append(self.get_metadata(PositionProvider, node).start.line)


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


class ParseVersion(Repair):
    """`parse_version` from packaging: setuptools has dropped pkg_resources."""

    title = "pkg_resources"
    why = "setuptools has no pkg_resources any more: the import fails"
    pattern = re.compile(rb"from\s+pkg_resources\s+import")

    @staticmethod
    def needed() -> bool:
        return find_spec("pkg_resources") is None

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.ImportFrom:
        names = original_node.names
        if dotted(original_node.module) != "pkg_resources" or isinstance(names, cst.ImportStar):
            return updated_node
        if len(names) != 1 or dotted(names[0].name) != "parse_version":
            return updated_node
        self.note(original_node)
        called = names[0].asname or cst.AsName(cst.Name("parse_version"))
        return updated_node.with_changes(
            module=cst.Attribute(cst.Name("packaging"), cst.Name("version")),
            names=[cst.ImportAlias(cst.Name("parse"), asname=called)],
        )


class StrToBool(Repair):
    """`strtobool` in place: Python 3.12 has dropped distutils."""

    title = "distutils"
    why = "Python has no distutils any more: the import fails"
    pattern = re.compile(rb"from\s+distutils\.util\s+import")

    @staticmethod
    def needed() -> bool:
        return find_spec("distutils") is None

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement:
        wanted = match.SimpleStatementLine(
            body=[
                match.ImportFrom(
                    module=match.Attribute(match.Name("distutils"), match.Name("util")),
                    names=[match.ImportAlias(name=match.Name("strtobool"), asname=None)],
                )
            ]
        )
        if not match.matches(original_node, wanted):
            return updated_node
        self.note(original_node)
        text = (
            "def strtobool(text):\n"
            "    if text.lower() in ('y', 'yes', 't', 'true', 'on', '1'):\n"
            "        return 1\n"
            "    if text.lower() in ('n', 'no', 'f', 'false', 'off', '0'):\n"
            "        return 0\n"
            "    raise ValueError(f'invalid truth value {text!r}')\n"
        )
        function = cst.parse_statement(text, config=self.module.config_for_parsing)
        assert isinstance(function, cst.FunctionDef)
        return function.with_changes(leading_lines=updated_node.leading_lines)


class NumpyAlias(Repair):
    """Names that NumPy has removed: `np.float` is `float`, `np.product` is `np.prod`."""

    title = "numpy"
    why = "NumPy has removed the name: AttributeError where it is used"
    pattern = re.compile(rb"\b(np|numpy)\.(" + "|".join(NUMPY_ALIASES).encode() + rb")\b")

    def __init__(self, module: cst.Module) -> None:
        super().__init__(module)
        self._called: set[str] = set()

    @staticmethod
    def needed() -> bool:
        return bool(NUMPY_ALIASES)

    def visit_Import(self, node: cst.Import) -> None:
        for alias in node.names:
            if dotted(alias.name) == "numpy":
                called = alias.asname.name if alias.asname else alias.name
                self._called.add(dotted(called) if isinstance(called, cst.Name) else "")

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        name = original_node.attr.value
        if dotted(original_node.value) not in self._called or name not in NUMPY_ALIASES:
            return updated_node
        new = NUMPY_ALIASES[name].removeprefix("np.")
        self.note(original_node)
        if NUMPY_ALIASES[name].startswith("np."):
            return updated_node.with_changes(attr=cst.Name(new))
        return cst.Name(new, lpar=updated_node.lpar, rpar=updated_node.rpar)


class PillowAlias(Repair):
    """Names that Pillow has removed: `Image.ANTIALIAS` is `Image.LANCZOS`."""

    title = "pillow"
    why = "Pillow has removed the name: AttributeError where it is used"
    pattern = re.compile(rb"Image\.(" + "|".join(PILLOW_ALIASES).encode() + rb")\b")

    @staticmethod
    def needed() -> bool:
        return find_spec("PIL") is not None

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.Attribute:
        import PIL.Image

        name = original_node.attr.value
        module = dotted(original_node.value)
        if name not in PILLOW_ALIASES or module not in ("Image", "PIL.Image"):
            return updated_node
        if hasattr(PIL.Image, name):
            return updated_node
        self.note(original_node)
        return updated_node.with_changes(attr=cst.Name(PILLOW_ALIASES[name]))


class SqrtmPair(Repair):
    """`s, _ = sqrtm(a, disp=False)` as `s = sqrtm(a)`: SciPy has deprecated `disp`."""

    title = "scipy"
    level = "note"
    why = "scipy.linalg.sqrtm is losing disp (deprecated in 1.17): FID warns now and fails later"
    pattern = re.compile(rb"sqrtm\(")

    @staticmethod
    def needed() -> bool:
        if find_spec("scipy") is None:
            return False
        from scipy.linalg import sqrtm

        disp = inspect.signature(sqrtm).parameters.get("disp")
        return disp is None or disp.default is not True

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        disp = match.Arg(keyword=match.Name("disp"), value=match.Name("False"))
        pair = match.Assign(
            targets=[
                match.AssignTarget(
                    target=match.Tuple(elements=[match.Element(), match.Element(match.Name("_"))])
                )
            ],
            value=match.Call(args=[match.Arg(keyword=None), disp]),
        )
        if not match.matches(original_node, pair):
            return updated_node
        call, target = updated_node.value, updated_node.targets[0].target
        assert isinstance(call, cst.Call)
        assert isinstance(target, cst.Tuple)
        if dotted(call.func).rpartition(".")[2] != "sqrtm":
            return updated_node
        self.note(original_node)
        argument = call.args[0].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated_node.with_changes(
            targets=[updated_node.targets[0].with_changes(target=target.elements[0].value)],
            value=call.with_changes(args=[argument]),
        )


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


REPAIRS: tuple[type[Repair], ...] = (
    SamplerArgument,
    PluginModule,
    ParseVersion,
    StrToBool,
    NumpyAlias,
    PillowAlias,
    SqrtmPair,
    AdamBetas,
    SharedBuffers,
)
