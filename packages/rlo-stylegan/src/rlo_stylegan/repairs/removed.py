"""Repairs for names that Python, setuptools, NumPy, Pillow and SciPy have removed."""

# ruff: noqa: N802  (libcst finds a visitor by the name of the node class)
from __future__ import annotations

import inspect
import re
from importlib.util import find_spec

import libcst as cst
import libcst.matchers as match
import numpy

from rlo_stylegan.checkout import dotted
from rlo_stylegan.repairs.base import Repair

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
