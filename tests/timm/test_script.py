"""Which scripts are recognised, and the commands around them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import upstream_table
from click.testing import CliRunner
from rlo_core.launch import ScriptError, load_script
from rlo_timm.cli import main
from rlo_timm.launcher.train_script import transform

WriteScript = Callable[[str], Path]


def injected(tree: ast.Module) -> list[str]:
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.Expr, ast.Assign)) and "_rlo_timm" in ast.unparse(node)
    ]


def test_the_tree_has_six_statements_more_and_every_line_stays(
    write_script: WriteScript, shape: str
) -> None:
    path = write_script(shape)
    plain, ours = load_script(path).tree, load_script(path, transform=transform).tree
    assert len(injected(ours)) == 7
    assert not injected(plain)
    defs = [
        [(n.name, n.lineno) for n in ast.walk(t) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        for t in (plain, ours)
    ]
    assert defs[0] == defs[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "parser = argparse.ArgumentParser",
            "options = argparse.ArgumentParser",
            "not a train.py: looked for `parser = ...ArgumentParser(...)` and a def after it, at "
            "the top level (rlo-timm knows timm's train.py from v0.2.1 on)",
        ),
        (
            "args = parser.parse_args(remaining)",
            "args = read(remaining)",
            "not a train.py: looked for `args = parser.parse_args(...)` in _parse_args() or main() "
            "(rlo-timm knows timm's train.py from v0.2.1 on)",
        ),
        (
            "def main():",
            "def run():",
            "not a train.py: looked for `def main()` (rlo-timm knows timm's train.py from v0.2.1 "
            "on)",
        ),
        (
            "    validate_loss_fn = nn.CrossEntropyLoss().to(device=device)\n",
            "    if mixup_active:\n        validate_loss_fn = nn.CrossEntropyLoss()\n"
            "    else:\n        validate_loss_fn = train_loss_fn\n",
            "not a train.py: looked for one `validate_loss_fn = ...` after `train_loss_fn = ...`, "
            "or one `task = ...Task(...)`, at the top level of main() (rlo-timm knows timm's "
            "train.py from v0.2.1 on)",
        ),
    ],
)
def test_an_unknown_shape_is_refused_with_what_was_looked_for(
    write_script: WriteScript, old: str, new: str, message: str
) -> None:
    path = write_script("v0.5")
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))
    with pytest.raises(ScriptError) as caught:
        load_script(path, transform=transform)
    assert str(caught.value) == message


def test_the_command_says_what_is_missing_and_runs_nothing(tmp_path: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text("raise RuntimeError\n")
    result = CliRunner().invoke(main, [str(script), "--loss", "rlo"])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {script}: not a train.py: looked for `parser = ...")


@pytest.mark.parametrize("words", [["train.py"], ["./train.py", "--loss", "rlo"]])
def test_where_there_is_no_train_py_the_command_says_where_to_get_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert result.output.startswith(
        f"Error: script must be a file, got {words[0]!r}, which is not there: timm's train.py is "
        "not part of the timm package; clone huggingface/pytorch-image-models from GitHub at the "
        "release you want (timm "
    )
    assert "`rlo-timm train` needs no script" in result.output


def test_a_word_that_is_neither_script_nor_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["trian"])
    assert result.exit_code == 2
    assert "No such command 'trian'" in result.output


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom rlo_timm.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print([m for m in sys.modules if m in ('torch', 'timm', 'lightning', 'torchvision')])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"
    assert "train.py [ARGS]... --loss SPEC" in out.stdout


def run(*argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def losses(folder: Path) -> list[float]:
    steps = torch.load(folder / "seen.pt", weights_only=True)["steps"]
    return [float(step["loss"]) for step in steps]


@pytest.mark.slow
def test_the_module_the_command_and_the_hook_are_the_same_run(
    write_script: WriteScript, tmp_path: Path
) -> None:
    write_script("v1.0.28")
    (tmp_path / "rlo.yaml").write_text("loss: rlo:k=8,m=10\n")
    entry = str(Path(sys.executable).parent / "timm")
    outputs = []
    for argv in (
        (entry, "train.py", "--loss", "rlo:k=8,m=10"),
        ("-m", "rlo_timm", "train.py", "--loss", "rlo:k=8,m=10"),
        ("train.py", "--device-modules", "rlo_timm.hook", "-c", "rlo.yaml"),
        # Spawned data workers load the script's file as it is on disk.
        ("-m", "rlo_timm", "train.py", "--loss", "rlo:k=8,m=10", "--workers", "1"),
    ):
        done = run(*argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("training loss: rlo:k=8,m=10, in place of Label") == 1
        outputs.append(losses(tmp_path))
        (tmp_path / "seen.pt").unlink()
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]


@pytest.mark.slow
def test_the_hook_takes_the_loss_from_the_environment_where_yaml_is_validated(
    write_script: WriteScript, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_script("v1.0.31")
    monkeypatch.setenv("RLO_LOSS", "rlo:k=8,m=10")
    done = run("train.py", "--device-modules", "rlo_timm.hook", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training loss: rlo:k=8,m=10, in place of Label" in done.stderr
    # A file with our loss is refused by the script itself, before the hook is imported.
    (tmp_path / "rlo.yaml").write_text("loss: rlo:k=8,m=10\n")
    argv = ("train.py", "--device-modules", "rlo_timm.hook", "-c", "rlo.yaml")
    assert "loss: invalid choice 'rlo:k=8,m=10'" in run(*argv, cwd=tmp_path).stderr


def test_the_hook_elsewhere_says_what_it_is_for(tmp_path: Path) -> None:
    done = run("-c", "import rlo_timm.hook", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "rlo_timm.hook is for `python train.py --device-modules rlo_timm.hook -c FILE.yaml`, got "
        "an import from None" in done.stderr
    )


@pytest.mark.slow
def test_two_ranks_make_the_update_of_one(write_script: WriteScript, tmp_path: Path) -> None:
    write_script("v1.0.28")
    argv = ("--loss", "rlo:k=8,m=10", "--mixup", "0", "--loss-schedule", "linear", "--epochs", "2")
    weights = []
    for launcher in (
        ("-m", "rlo_timm"),
        ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rlo_timm"),
    ):
        done = run(*launcher, "train.py", *argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("training loss: rlo") == 1
        weights.append(torch.load(tmp_path / "last.pth.tar", weights_only=True)["state_dict"])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)


def test_an_error_in_the_script_shows_the_scripts_own_lines(
    write_script: WriteScript, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_script()
    source = path.read_text().replace("        optimizer.step()", "        optimizer.steep()")
    path.write_text(source)
    line = 1 + source.splitlines().index("        optimizer.steep()")
    result = CliRunner().invoke(main, [str(path), "--loss", "rlo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert f'File "{path}", line {line}, in train_one_epoch' in result.stderr
    assert "rlo_core" not in result.stderr.partition("Traceback")[2]


def test_the_table_of_the_guide_is_what_the_results_say() -> None:
    text = upstream_table.PAGE.read_text()
    assert upstream_table.drawn(text, list(upstream_table.read().values())) == text
