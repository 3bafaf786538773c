"""No command ends with a traceback where it cannot write: one line, and exit status 1.

The commands come from Click itself: one that is new fails here until it is said what it writes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
resource = pytest.importorskip("resource")
PROGRAMS = ("rlo", "rlo-timm", "rlo-hf", "rlo-gptq", "rlo-stylegan")
ROOT = Path(__file__).resolve().parent.parent


def program(name: str) -> click.Command:
    (entry,) = entry_points(group="console_scripts", name=name)
    command = entry.load()
    assert isinstance(command, click.Command)
    return command


def leaves(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the names of the commands below one, hidden ones too; hosts of `rlo` are programs."""
    if not isinstance(command, click.Group):
        yield path
        return
    for name, inner in command.commands.items():
        yield from leaves(inner, (*path, name))


COMMANDS = [path for name in PROGRAMS for path in leaves(program(name), (name,))]
READS = {
    ("rlo", "losses"),
    ("rlo", "doctor"),
    ("rlo-timm", "eval"),
    ("rlo-timm", "push"),  # uploads a folder that is whole
    ("rlo-gptq", "compare"),
    ("rlo-gptq", "eval"),
    ("rlo-gptq", "inspect"),
    ("rlo-gptq", "plan"),
    ("rlo-stylegan", "status"),
}
"""These write nothing."""
SCRIPTS = {("rlo-timm", "run"), ("rlo-hf", "run"), ("rlo-stylegan", "train")}
"""These run a script of the user's, whose errors are its own."""
ELSEWHERE = {("rlo-gptq", "pareto")}
"""What they write is tested beside their code, in tests/gptq/allocation."""


class World:
    """What the commands read, made when it is asked for."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def once(self, name: str, make: Callable[[Path], Any]) -> Path:
        path = self.home / name
        if not path.exists():
            make(path)
        return path

    @property
    def run(self) -> Path:
        """A run with a curve."""

        def make(folder: Path) -> None:
            from rlo_core.runs.record import Run

            run = Run.create(folder, kind="test", loss="ce", seed=0)
            for epoch in (1, 2, 3):
                run.log(epoch=epoch, ce=1 / epoch)
            run.finish(ce=0.3)

        return self.once("run", make)

    @property
    def gan_run(self) -> Path:
        def make(folder: Path) -> None:
            folder.mkdir()
            (folder / "training_options.json").write_text("{}")
            line = {"Progress/kimg": {"num": 1, "mean": 1.0}}
            (folder / "stats.jsonl").write_text(json.dumps(line) + "\n")

        return self.once("gan", make)

    @property
    def text(self) -> Path:
        lines = "".join(f"{i} times {j} is {i * j}.\n" for i in range(20) for j in range(20))
        return self.once("text.txt", lambda path: path.write_text(lines))

    @property
    def model(self) -> Path:
        """A tiny Llama with a tokenizer."""

        def make(folder: Path) -> None:
            import torch
            import transformers
            from rlo_gptq.demo import byte_tokenizer

            torch.manual_seed(0)
            config = transformers.LlamaConfig(
                vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=64,
                bos_token_id=256, eos_token_id=257, pad_token_id=258,
            )  # fmt: skip
            transformers.LlamaForCausalLM(config).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)

        return self.once("model", make)

    @property
    def quantized(self) -> Path:
        return self.once("quantized", lambda folder: done(QUANTIZE, self.quantizing(folder)))

    @property
    def plain(self) -> Path:
        """A checkpoint that GPTQ's format can hold."""
        return self.once(
            "plain", lambda folder: done(QUANTIZE, [*self.quantizing(folder), "--format", "gptq"])
        )

    @property
    def gptq(self) -> Path:
        """A checkpoint in GPTQ's format."""

        def make(folder: Path) -> None:
            done(("rlo-gptq", "export"), [self.plain, "--out", folder])

        return self.once("gptq", make)

    @property
    def adapter(self) -> Path:
        """An adapter of the quantized model, as peft saves it."""

        def make(folder: Path) -> None:
            peft = pytest.importorskip("peft")
            import transformers

            model = transformers.AutoModelForCausalLM.from_pretrained(self.quantized)
            config = peft.LoraConfig(r=2, target_modules=["q_proj"])
            peft.get_peft_model(model, config).save_pretrained(folder)

        return self.once("adapter", make)

    short = ("--nsamples", 2, "--seqlen", 32)

    def quantizing(self, out: Path) -> list[Any]:
        return [self.model, self.text, "--wbits", 4, "--quant", "ldlq", *self.short, "--save", out]

    def checkout(self, changed: bool = False) -> Path:
        spec = importlib.util.spec_from_file_location(
            "gan_checkouts", ROOT / "stylegan" / "conftest.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        def make(folder: Path) -> None:
            loss, script = module.FAMILIES["ada"]
            module.write(folder, module.COMMON)
            module.write(folder, {"training/loss.py": loss, "train.py": script})
            if changed:
                assert call(("rlo-stylegan", "apply"), [folder]).exit_code == 0

        return self.once("changed" if changed else "checkout", make)

    @property
    def tiny_imagenet(self) -> Path:
        """One picture of each part, in the layout of the archive."""

        def make(folder: Path) -> None:
            from PIL import Image

            picture = folder / "train" / "n1" / "images" / "n1_0.JPEG"
            picture.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(picture)
            images = folder / "val" / "images"
            images.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(images / "val_0.JPEG")
            (folder / "wnids.txt").write_text("n1\n")
            (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\t0\t0\t8\t8\n")

        return self.once("tiny", make)


QUANTIZE = ("rlo-gptq", "quantize")
DIGITS = ["--dataset", "digits", "--net", "test_resnet", "-b", 16, "--device", "cpu", "--json"]
DIGITS += ["--workers", 0, "--train-limit", 32, "--val-limit", 20, "--epochs", 1]

WRITES: dict[tuple[str, ...], Callable[[World, Path], list[Any]]] = {
    ("rlo", "plot"): lambda w, out: ["ce", "--out", out / "links.png"],
    ("rlo", "report"): lambda w, out: [w.run, "--out", out / "page.html"],
    ("rlo", "demo"): lambda w, out: ["digits", "--out", out],
    ("rlo-timm", "train"): lambda w, out: [*DIGITS, "-o", out],
    ("rlo-hf", "finetune"): lambda w, out: [
        w.model, w.text, "--out", out, "--block", 32, "--batch-size", 4, "--max-steps", 2,
        "--train-tokens", 2000, "--eval-tokens", 200, "--json",
    ],
    ("rlo-gptq", "quantize"): lambda w, out: w.quantizing(out),
    ("rlo-gptq", "tune"): lambda w, out: [
        w.quantized, w.text, "--original", w.model, *w.short, "--save", out,
    ],
    ("rlo-gptq", "export"): lambda w, out: [w.plain, "--out", out],
    ("rlo-gptq", "import"): lambda w, out: [w.gptq, out],
    ("rlo-gptq", "merge"): lambda w, out: [w.adapter, w.text, *w.short, "--save", out],
    ("rlo-stylegan", "report"): lambda w, out: [w.gan_run, "--out", out / "page.html"],
}  # fmt: skip
"""How each command writes into a folder."""
IN_PLACE: dict[tuple[str, ...], Callable[[World], list[Any]]] = {
    ("rlo-timm", "prepare"): lambda w: ["tiny-imagenet", w.tiny_imagenet],
    ("rlo-stylegan", "apply"): lambda w: [w.checkout()],
    ("rlo-stylegan", "doctor"): lambda w: [w.checkout(), "--compat"],
    ("rlo-stylegan", "revert"): lambda w: [w.checkout(changed=True)],
}
"""These change the folder that they are given."""
SLOW = {("rlo", "demo"), ("rlo-gptq", "tune"), ("rlo-hf", "finetune"), ("rlo-timm", "train")}


def call(command: tuple[str, ...], arguments: list[Any]) -> Result:
    name, *rest = command
    return CliRunner().invoke(program(name), [*rest, *map(str, arguments)])


def done(command: tuple[str, ...], arguments: list[Any]) -> None:
    result = call(command, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A write beyond `size` bytes of a file fails, as on a disk that is full."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def check_refused(result: Result, *reasons: str) -> None:
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0]
    assert len(errors[0]) > len("Error: ")
    assert not reasons or any(reason in errors[0] for reason in reasons), errors[0]


def written(*paths: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for path in paths for p in path.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def cases(*, tables: tuple[dict[tuple[str, ...], Any], ...]) -> list[Any]:
    commands = [command for table in tables for command in table]
    return [
        pytest.param(c, id=" ".join(c), marks=[pytest.mark.slow] if c in SLOW else [])
        for c in commands
    ]


def test_of_every_command_it_is_known_what_it_writes() -> None:
    known = READS | SCRIPTS | ELSEWHERE | set(WRITES) | set(IN_PLACE)
    assert set(COMMANDS) == known


@pytest.mark.parametrize("command", cases(tables=(WRITES,)))
def test_an_output_that_cannot_be_made_is_one_line(
    world: World, tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a regular file nothing can be made, not even by an administrator."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    arguments = WRITES[command](world, tmp_path / "file" / "out")
    check_refused(call(command, arguments), "Not a directory", "no folder", "File exists")
    assert written(tmp_path) == {tmp_path / "file": b"mine"}


@pytest.mark.parametrize("command", cases(tables=(WRITES, IN_PLACE)))
@pytest.mark.parametrize("size", [0, 3000])
def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(
    world: World,
    tmp_path: Path,
    command: tuple[str, ...],
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if command in IN_PLACE:
        arguments = IN_PLACE[command](world)
        before = written(arguments[-1] if isinstance(arguments[-1], Path) else arguments[0])
    else:
        arguments = WRITES[command](world, tmp_path / "out")
        before = {}
    with no_file_above(size):
        result = call(command, arguments)
    if result.exit_code == 0 and (size or command == ("rlo-timm", "prepare")):
        return  # all that it writes is smaller; `prepare` moves files
    check_refused(result, "File too large", "No space left", "is the disk full?")
    assert not list(tmp_path.rglob(".*.tmp"))
    assert not list(world.home.rglob(".*.tmp"))
    for path, content in before.items():
        assert path.read_bytes() == content


def test_a_script_that_is_not_there_is_one_line() -> None:
    for command in sorted(SCRIPTS):
        name, *rest = command
        words = rest if name != "rlo-timm" else []
        result = CliRunner().invoke(program(name), [*words, "nowhere.py"])
        check_refused(result)


@pytest.mark.parametrize(
    ("module", "error", "line"),
    [
        ("pickle", "UnpicklingError('pickle data was truncated')", "a checkpoint cannot be read: "),
        ("json", "JSONDecodeError('Expecting value', 'x', 0)", "a file is not JSON: Expecting"),
        (
            "yaml",
            "YAMLError('found a tab\\nhere')",
            "a file cannot be read or written: found a tab",
        ),
        ("zipfile", "BadZipFile('not a zip')", "a file is not whole: not a zip"),
        ("safetensors", "SafetensorError('too small')", "a file cannot be read or written: too"),
        ("builtins", "OSError('no model here\\nlook at')", "no model here"),
        ("builtins", "EOFError()", "a file is not whole: EOFError"),
        ("builtins", "OSError(28, 'No space left', 'a/b')", "a/b: No space left"),
        (
            "builtins",
            "RuntimeError('[enforce fail at inline_container.cc:1] . unexpected pos')",
            "a checkpoint cannot be written, is the disk full? [enforce fail",
        ),
    ],
)
def test_errors_of_files_are_one_line_in_every_command(
    module: str, error: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    raised = eval(f"module.{error}", {"module": importlib.import_module(module)})

    def fails(**_: Any) -> None:
        raise raised

    for name in PROGRAMS:
        group = program(name)
        assert isinstance(group, click.Group)
        command = next(iter(group.commands.values()))
        monkeypatch.setattr(command, "callback", fails)
        monkeypatch.setattr(command, "params", [])
        result = CliRunner().invoke(group, [command.name or ""])
        check_refused(result)
        assert result.stderr.startswith(f"Error: {line}"), result.stderr


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    group = program("rlo")
    assert isinstance(group, click.Group)

    def fails(**_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(group.commands["losses"], "callback", fails)
    result = CliRunner().invoke(group, ["losses"])
    assert isinstance(result.exception, KeyError)
