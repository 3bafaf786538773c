"""The public names of each package, as `packages/NAME/PUBLIC_API.txt` lists them.

    python scripts/public_api.py            prints what differs
    python scripts/public_api.py --write    brings the files up to date

A line is a module, a name with its parameters (`k=` can be left out, `*` begins what is given by
name), a command's option, or an entry point. What a line says holds until a release that says
otherwise in its CHANGELOG; CONTRIBUTING.md has the rule.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
FILE = "PUBLIC_API.txt"

# Modules whose names people import. A tuple lists the names of a module that has others too.
MODULES: dict[str, dict[str, tuple[str, ...] | None]] = {
    "rlo-core": {
        "rlo_core": None,
        "rlo_core.boosting": None,
        "rlo_core.cli": ("FriendlyGroup",),
        "rlo_core.compare.measures": ("Held", "criterion_value"),
        "rlo_core.compare.task": ("CompareError", "DivergedError", "Task"),
        "rlo_core.demo": ("demo_parts", "run_demo"),
        "rlo_core.errors": None,
        "rlo_core.functional": None,
        "rlo_core.gates": None,
        "rlo_core.hosts": None,
        "rlo_core.launch": None,
        "rlo_core.linear": None,
        "rlo_core.linear_model": None,
        "rlo_core.links": None,
        "rlo_core.modules": None,
        "rlo_core.registry": None,
        "rlo_core.robust": None,
        "rlo_core.runs": ("Run", "read_metrics", "read_run"),
        "rlo_core.schedules": None,
    },
    # `rlo_timm.hook` runs the main script again when it is imported, so it is only looked for.
    "rlo-timm": {"rlo_timm": None, "rlo_timm.hook": ()},
    "rlo-hf": {"rlo_hf": None, "rlo_hf.trl": None},
    "rlo-gptq": {"rlo_gptq": None},
    # The last three are what a changed checkout and its pickles name.
    "rlo-stylegan": {
        "rlo_stylegan": None,
        "rlo_stylegan.criterion": ("GanLoss",),
        "rlo_stylegan.factory": ("patched_loss",),
        "rlo_stylegan.flags": ("gan_loss_kwargs",),
    },
}


def public_names(module: ModuleType) -> list[str]:
    """Return `__all__`, or else the functions and classes that the module defines."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(set(listed) - {"__version__"})
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    )


def parameters(value: Any) -> str | None:
    """Return the parameters of a callable as one line: `logits, target, *, k=, m=`."""
    if inspect.isclass(value):
        # What a class takes from a base of torch's, click's or transformers' is theirs to change.
        owner = next((c for c in value.__mro__ if "__init__" in vars(c)), object)
        if not owner.__module__.startswith("rlo_"):
            return None
        foreign = [c.__init__ for c in value.__mro__ if not c.__module__.startswith("rlo_")]
        theirs = {name for init in foreign for name in inspect.signature(init).parameters}
        value = owner.__init__
    elif isinstance(value, click.Command):
        return None
    else:
        theirs = {"self"}
    signature = inspect.signature(value, follow_wrapped=False)
    shown, keywords = [], False
    for parameter in signature.parameters.values():
        if parameter.name in theirs | {"cls"}:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            keywords = True
            shown.append("*")
        elif parameter.kind is parameter.VAR_KEYWORD:
            shown.append(f"**{parameter.name}")
        else:
            if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
                keywords = True
                shown.append("*")
            optional = parameter.default is not parameter.empty
            shown.append(parameter.name + ("=" if optional else ""))
    return ", ".join(shown)


def described(dotted: str, value: Any) -> list[str]:
    """Return the lines of one name: itself, and the methods and properties of a class of ours."""
    shown = parameters(value) if callable(value) else None
    lines = [dotted if shown is None else f"{dotted}({shown})"]
    if not inspect.isclass(value):
        return lines
    foreign = [base for base in value.__mro__ if not base.__module__.startswith("rlo_")]
    for owner in value.__mro__:
        if not owner.__module__.startswith("rlo_"):
            continue
        for name, member in vars(owner).items():
            if name.startswith("_") or any(hasattr(base, name) for base in foreign):
                continue
            if isinstance(member, (staticmethod, classmethod)):
                member = member.__func__
            if inspect.isfunction(member):
                lines.append(f"{dotted}.{name}({parameters(member)})")
            elif isinstance(member, property):
                lines.append(f"{dotted}.{name}")
    return lines


def is_flag(word: str) -> bool:
    """Say if a word is a long flag in its usual spelling; `--batch_size` is `--batch-size`."""
    return word.startswith("--") and "_" not in word


def options(command: click.Command, path: str) -> list[str]:
    """Return `path` and its options, and those of its subcommands of this package."""
    if command.hidden:
        return []
    lines = [f"$ {path}"]
    for parameter in command.params:
        lines += [f"$ {path} {flag}" for flag in parameter.opts if is_flag(flag)]
    if isinstance(command, click.Group):
        # `commands` holds the group's own, not the hosts that other packages add.
        for name, child in command.commands.items():
            lines += options(child, f"{path} {name}")
    return lines


def inventory(package: str) -> list[str]:
    """Return the lines of a package as they are now."""
    lines: set[str] = set()
    for name, only in MODULES[package].items():
        lines.add(f"module {name}")
        if only == ():
            continue
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            # It needs an extra that is not installed here: what the file says of it holds.
            lines.update(line for line in listed(package) if line.startswith(f"{name}."))
            continue
        names = set(public_names(module) if only is None else only)
        # A promised name may have moved to another module and still be found here.
        promised = {_parts(line)[0] for line in listed(package) if line.startswith(f"{name}.")}
        names |= {word for word in (p[len(name) + 1 :] for p in promised) if hasattr(module, word)}
        for attribute in sorted(names):
            lines.update(described(f"{name}.{attribute}", getattr(module, attribute)))
    for entry in distribution(package).entry_points:
        if entry.group == "console_scripts" and entry.name != "timm":  # a script's own options
            lines.update(options(entry.load(), entry.name))
        kind = "command" if entry.group == "console_scripts" else f"entry point {entry.group}"
        lines.add(f"{kind} {entry.name}")
    return sorted(lines)


def listed(package: str) -> list[str]:
    """Return the lines of the package's file."""
    text = (ROOT / "packages" / package / FILE).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _parts(line: str) -> tuple[str, list[str]]:
    name, _, rest = line.partition("(")
    return name, [part for part in rest.rstrip(")").split(", ") if part]


def _broken(before: list[str], now: list[str]) -> str | None:
    """Return what a caller of `before` cannot do any more with `now`."""
    names = [part.rstrip("=") for part in now]
    catches_all = any(part.startswith("**") for part in now)
    for part in before:
        name = part.rstrip("=")
        if name in ("*",) or name.startswith("**"):
            continue
        if name not in names:
            if catches_all:
                continue
            return f"takes no {name} any more"
        if part.endswith("=") and not now[names.index(name)].endswith("="):
            return f"cannot do without {name} any more"
    before_names = [part.rstrip("=") for part in before]
    for part in now:
        if part.endswith("=") or part == "*" or part.startswith("**"):
            continue
        if part not in before_names:
            return f"asks for {part}"
    positional = before_names[: before_names.index("*")] if "*" in before_names else before_names
    positional = [name for name in positional if not name.startswith("**")]
    now_positional = names[: names.index("*")] if "*" in names else names
    if now_positional[: len(positional)] != positional:
        return f"has its positional parameters in another order: {', '.join(now_positional)}"
    return None


def compare(before: list[str], now: list[str]) -> tuple[list[str], list[str]]:
    """Return what of `before` is gone or changed against its callers, and what is new."""
    current = dict(map(_parts, now))
    gone = []
    for line in before:
        name, takes = _parts(line)
        if name not in current:
            gone.append(f"{name} is gone")
        elif problem := _broken(takes, current[name]):
            gone.append(f"{name} {problem}")
    known = dict(map(_parts, before))
    return gone, [line for line in now if _parts(line)[0] not in known]


def write(package: str) -> None:
    """Bring the package's file up to date."""
    head = (
        f"# What {package} promises to keep: modules, names with their parameters, commands and\n"
        "# entry points. `make public-api` brings it up to date, a test holds the code to it.\n"
    )
    path = ROOT / "packages" / package / FILE
    path.write_text(head + "\n".join(inventory(package)) + "\n", encoding="utf-8")


def main() -> None:
    """Print what differs, or write it."""
    for package in MODULES:
        if "--write" in sys.argv[1:]:
            write(package)
            continue
        gone, new = compare(listed(package), inventory(package))
        for line in [*(f"- {line}" for line in gone), *(f"+ {line}" for line in new)]:
            print(f"{package}: {line}")


if __name__ == "__main__":
    main()
