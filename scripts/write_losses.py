"""Write the functions, criteria, exports and entry points of the built-in losses from their links.

A link class in `rlo_core.links` has the name, the options and the text of a loss. What repeats its
options with the common ones (a signature that an editor shows and mypy reads) is written from it:

    python scripts/write_losses.py            # write
    python scripts/write_losses.py --check    # exit 1 where a file is not what would be written
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import torch
from rlo_core.functional import link_cross_entropy
from rlo_core.links import BUILT_IN, Link, _Root

PACKAGE = Path(__file__).resolve().parent.parent / "packages" / "rlo-core"
SOURCE = PACKAGE / "src" / "rlo_core"
BEGIN = "# Written by scripts/write_losses.py from rlo_core.links; change it there."
END = "# End of what is written."

COMMON = """\
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
"""
PASSED = """\
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
"""
COMMON_ARGS = """\
    weight: Class weights, (C), multiplying the loss.
    ignore_index: Index targets with this value give 0 and are not counted.
    label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.
    reduction: "mean", "sum" or "none".
"""


def options_of(link: type[Link]) -> list[tuple[str, str, object]]:
    """Return name, annotation and default of each option of a link."""
    return [(f.name, str(f.type), f.default) for f in dataclasses.fields(link)]


def parts_of(link: type[Link]) -> tuple[str, str, str, str]:
    """Return a link's docstring: first line, paragraphs, Args lines, source."""
    text = inspect.cleandoc(link.__doc__ or "")
    first, _, rest = text.partition("\n\n")
    found = re.search(r"^Args:\n((?:    .*\n?)+)", rest, re.MULTILINE)
    arguments = inspect.cleandoc(found[1]) if found else ""
    source = re.search(r"^Source:.*(?:\n.+)*", rest, re.MULTILINE)
    end = min(m.start() for m in (found, source, re.search(r"\Z", rest)) if m is not None)
    first = re.sub(r":? ?(?:value )?:math:", " :math:", first).replace("  ", " ")
    return " ".join(first.split()), rest[:end].strip(), arguments, source[0] if source else ""


def indented(text: str, spaces: int) -> str:
    """Return the text, its lines moved to the right."""
    return "".join(" " * spaces + line if line.strip() else line for line in text.splitlines(True))


def called(link: type[Link]) -> str:
    """Return the expression that makes the link of its options."""
    return f"{link.__name__}({', '.join(name for name, _, _ in options_of(link))})"


def signature(link: type[Link], spaces: int) -> str:
    """Return the options of a link as parameters, one a line."""
    return "".join(
        f"{' ' * spaces}{name}: {kind} = {default!r},\n" for name, kind, default in options_of(link)
    )


def example(link: type[Link]) -> str:
    """Return a doctest with the value that the link gives today."""
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    value = link_cross_entropy(logits, torch.tensor([0, 2]), link())
    return (
        "    >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])\n"
        f"    >>> loss = {link.function}(logits, torch.tensor([0, 2]))\n"
        f"    >>> round(loss.item(), 4)\n    {round(value.item(), 4)}\n"
    )


def function(link: type[Link]) -> str:
    """Return the functional form of a link."""
    first, body, arguments, source = parts_of(link)
    doc = f'r"""{first}\n\n' + (f"{body}\n\n" if body else "")
    doc += "Args:\n    logits: Floating, (C), (N, C) or (N, C, d1, ..., dK).\n"
    doc += "    target: Class indices or class probabilities, as `link_cross_entropy` takes them.\n"
    doc += (indented(arguments, 4) + "\n" if arguments else "") + COMMON_ARGS
    doc += (
        '\nReturns:\n    A scalar, or for "none" the shape of an index target; float32 for half\n'
    )
    doc += "    precision.\n\nRaises:\n"
    doc += (
        "    ValueError, TypeError, IndexError: as `link_cross_entropy`, and for an option that\n"
    )
    doc += "        is not in its range.\n\nExample:\n" + example(link)
    doc += f'\n{source}\n"""\n' if source else '"""\n'
    return (
        f"\n\ndef {link.function}(\n    logits: Tensor,\n    target: Tensor,\n    *,\n"
        f"{signature(link, 4)}{COMMON}) -> Tensor:\n{indented(doc, 4)}"
        "    return link_cross_entropy(\n        logits,\n        target,\n"
        f"        {called(link)},\n{PASSED}    )\n"
    )


def binary(link: type[Link]) -> str:
    """Return the binary form of a rooted link."""
    return (
        f"\n\ndef binary_{link.function}(\n    logits: Tensor,\n    target: Tensor,\n    *,\n"
        f"{signature(link, 4)}    weight: Tensor | None = None,\n"
        "    pos_weight: Tensor | None = None,\n"
        '    reduction: Reduction = "mean",\n) -> Tensor:\n'
        f'    r"""`{link.function}` of each logit\'s own two classes.\n\n'
        "    `link_binary_cross_entropy` says what the arguments are and what is returned; the\n"
        f'    options are those of `{link.function}`.\n    """\n'
        f"    return link_binary_cross_entropy(\n        logits,\n        target,\n"
        f"        {called(link)},\n        weight=weight,\n        pos_weight=pos_weight,\n"
        "        reduction=reduction,\n    )\n"
    )


def criterion(link: type[Link]) -> str:
    """Return the class of a link's criterion."""
    first, body, arguments, _ = parts_of(link)
    rooted = issubclass(link, _Root)
    base = "_RootLoss" if rooted else "LinkLoss"
    schedule = (
        "    warmup: Share of the run over which k moves from `k_start` to k; see\n"
        "        `rlo_core.schedules`.\n"
        '    schedule: "linear", "cosine", "geometric" or "constant".\n'
        "    k_start: k at the start of the warmup; inf is cross entropy.\n"
    )
    doc = f'r"""{first}\n\n' + (f"{body}\n\n" if body else "") + "Args:\n"
    doc += (indented(arguments, 4) + "\n" if arguments else "") + (schedule if rooted else "")
    doc += COMMON_ARGS + "\nExample:\n"
    doc += "    >>> import torch\n"
    doc += f"    >>> criterion = {link.criterion}(label_smoothing=0.1)\n"
    doc += "    >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3])).shape\n    torch.Size([])\n"
    text = f'\n\nclass {link.criterion}({base}):\n{indented(doc, 4)}    """\n\n'
    text += f"    formula = {link.formula!r}\n"
    if rooted:
        return text + f"    link_type = {link.__name__}\n"
    return text + (
        "\n    def __init__(\n        self,\n"
        f"{signature(link, 8)}        *,\n{indented(COMMON, 4)}    ) -> None:\n"
        f"        super().__init__(\n            {called(link)},\n{indented(PASSED, 4)}        )\n"
    )


def between(text: str, written: str, end: str = "") -> str:
    """Return a file's text with what stands after BEGIN (up to END, if it has one) replaced."""
    imported = re.search(r"from rlo_core\.links import (\([^)]*\)|.*)\n", text)
    if imported is not None:
        names = {*re.findall(r"\w+", imported[1]), *(c.__name__ for c in BUILT_IN.values())}
        line = f"from rlo_core.links import {', '.join(sorted(names))}\n"
        text = text.replace(imported[0], line)
    head, found, tail = text.partition(BEGIN)
    if not found:
        raise SystemExit(f"write_losses.py: a file lacks the line {BEGIN!r}")
    rest = tail.partition(END)[2] if END in tail else end
    return head + BEGIN + "\n" + written + (END + rest if END in tail else "")


def exports(text: str) -> str:
    """Return `rlo_core/__init__.py` with the names of all built-in losses."""
    own = {
        "links": [link.__name__ for link in BUILT_IN.values()],
        "functional": [
            name
            for link in BUILT_IN.values()
            if link.function
            for name in (link.function, *([f"binary_{link.function}"] * issubclass(link, _Root)))
        ],
        "modules": [link.criterion for link in BUILT_IN.values()],
    }
    for module, names in own.items():
        for name in names:
            if f'"{name}"' not in text:
                text = text.replace(
                    f'    "{module}": (', f'    "{module}": (\n        "{name}",', 1
                )
            line = f"    from rlo_core.{module} import {name} as {name}\n"
            if line not in text:
                text = text.replace("if TYPE_CHECKING:\n", f"if TYPE_CHECKING:\n{line}", 1)
    return text


def entry_points(text: str) -> str:
    """Return pyproject.toml with the entry points of all built-in losses; others are kept."""
    lines = [f'{name} = "rlo_core.modules:{link.criterion}"\n' for name, link in BUILT_IN.items()]
    pattern = r'(\[project\.entry-points\."rlo_core\.losses"\]\n)((?:.+\n)*)'

    def section(found: re.Match[str]) -> str:
        others = [s for s in found[2].splitlines(True) if "rlo_core.modules:" not in s]
        return found[1] + "".join(lines + others)

    return re.sub(pattern, section, text)


def formatted(path: Path, text: str) -> str:
    """Return Python text as the project's formatter has it."""
    ruff = [sys.executable, "-m", "ruff"]
    for words in (["check", "--select", "I", "--fix", "-q"], ["format", "-q"]):
        command = [*ruff, *words, "--stdin-filename", str(path), "-"]
        text = subprocess.run(
            command, input=text, capture_output=True, text=True, check=True
        ).stdout
    return text


def written() -> dict[Path, str]:
    """Return what each file should be."""
    functions = [
        function(link) + (binary(link) if issubclass(link, _Root) else "")
        for link in BUILT_IN.values()
        if link.function
    ]
    criteria = [criterion(link) for link in BUILT_IN.values()]
    python = {
        SOURCE / "functional.py": lambda text: between(text, "".join(functions)),
        SOURCE / "modules.py": lambda text: between(text, "".join(criteria)),
        SOURCE / "__init__.py": exports,
    }
    found = {p: formatted(p, change(p.read_text("utf-8"))) for p, change in python.items()}
    project = PACKAGE / "pyproject.toml"
    return {**found, project: entry_points(project.read_text("utf-8"))}


def main() -> int:
    """Write the files, or with --check say which are not current."""
    check = sys.argv[1:] == ["--check"]
    stale = 0
    for path, text in written().items():
        before = path.read_text("utf-8")
        if text == before:
            continue
        stale += 1
        if check:
            name = str(path.relative_to(PACKAGE))
            diff = difflib.unified_diff(before.splitlines(), text.splitlines(), name, name, n=1)
            print("\n".join(list(diff)[:20]))
        else:
            path.write_text(text, "utf-8")
            print(f"wrote {path.relative_to(PACKAGE)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
