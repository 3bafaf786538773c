"""apply, revert and status: what changes, and that every byte comes back."""

from __future__ import annotations

import ast
import json
import os
import random
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rlo_stylegan import ledger as ledger_module
from rlo_stylegan.checkout import LOSS, SCRIPT, Checkout, find_checkout
from rlo_stylegan.checkout import RECORD as FOLDER
from rlo_stylegan.cli import main
from rlo_stylegan.errors import ChangedError
from rlo_stylegan.layers import carry_out, plan
from rlo_stylegan.ledger import Ledger
from rlo_stylegan.script import patch_script
from rlo_stylegan.sites import patch_loss

pytestmark = pytest.mark.usefixtures("sampler_repair")
FAMILIES = ["ada", "stylegan3", "vision-aided"]


def bring(checkout: Checkout, *layers: str) -> list[str]:
    return carry_out(plan(checkout, layers))


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result.output


@pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
@pytest.mark.parametrize("bom", [False, True], ids=["plain", "bom"])
@pytest.mark.parametrize("family", FAMILIES)
def test_apply_changes_a_few_lines_and_revert_gives_every_byte_back(
    build, snapshot, family: str, bom: bool, crlf: bool
) -> None:
    root = build(family, bom=bom, crlf=crlf)
    before = snapshot(root)
    checkout = find_checkout(root)
    originals = {name: checkout.read(name) for name in (LOSS, SCRIPT)}
    assert bring(checkout, "loss") == [SCRIPT, LOSS]
    for name, original in originals.items():
        patched = checkout.read(name)
        assert patched.startswith(b"\xef\xbb\xbf") == bom
        assert patched.count(b"\n") == (patched.count(b"\r\n") if crlf else patched.count(b"\n"))
        assert (b"\r" in patched) == crlf
        kept = [line for line in original.splitlines() if line in patched.splitlines()]
        assert len(original.splitlines()) - len(kept) <= 6
        ast.parse(patched)
    loss = checkout.read(LOSS).decode("utf-8-sig")
    assert "g_loss = self.gan_loss(-fake_logits, 'G') # fool D" in loss
    assert "d_fake = self.gan_loss(fake_logits, 'D_fake')   # catch G" in loss
    assert "d_real = self.gan_loss(-real_logits, 'D_real')" in loss
    assert "softplus(-" not in loss
    bring(checkout)
    assert snapshot(root) == before
    assert not (root / FOLDER).exists()


def test_the_patched_files_read_as_if_written_by_hand(build) -> None:
    checkout = find_checkout(build("stylegan3"))
    loss = patch_loss(checkout, checkout.read(LOSS), checkout.read(SCRIPT)).decode()
    assert (
        "        r1_gamma = 10,     # weight of the penalty\n        gan_loss='ce',\n    ):" in loss
    )
    assert "        self.gan_loss = GanLoss(gan_loss, report=training_stats.report)\n" in loss
    script = patch_script(checkout.read(SCRIPT)).decode()
    assert (
        "    c.loss_kwargs.update("
        "gan_loss_kwargs(kwargs['loss'], kwargs['kparam'], kwargs['mparam']))\n" in script
    )
    ada = find_checkout(build("ada", folder="ada"))
    forwarded = patch_script(ada.read(SCRIPT)).decode()
    assert (
        "    scale = None, # Of the logits\n    loss='ce',\n    kparam=None,\n    mparam=None,\n):"
        in forwarded
    )
    wrapped = find_checkout(build("vision-aided", folder="wrapped"))
    text = patch_loss(wrapped, wrapped.read(LOSS), wrapped.read(SCRIPT)).decode()
    assert "                 noise=None, gan_loss='ce'):\n" in text


def test_both_commands_are_idempotent_and_say_so(build, snapshot) -> None:
    root = build()
    before = snapshot(root)
    assert "nothing to revert" in run("revert", root)
    assert "changed in" in run("apply", root)
    after = snapshot(root)
    assert "nothing to apply" in run("apply", root)
    assert snapshot(root) == after
    assert "the checkout is as it was" in run("revert", root)
    assert snapshot(root) == before


def test_dry_run_and_diff_write_nothing(build, snapshot) -> None:
    root = build()
    before = snapshot(root)
    assert "would change in" in run("apply", root, "--dry-run")
    diff = run("apply", root, "--diff")
    assert diff.startswith("--- a/train.py\n+++ b/train.py\n")
    assert "+            g_loss = self.gan_loss(-fake_logits, 'G') # fool D\n" in diff
    assert snapshot(root) == before
    document = json.loads(run("apply", root, "--dry_run", "--json"))
    assert document["layers"] == ["loss"]
    assert document["files"] == ["train.py", "training/loss.py"]
    assert document["written"] == []


def test_modes_and_symbolic_links_are_kept(build, snapshot, tmp_path: Path) -> None:
    root = build()
    (root / SCRIPT).chmod(0o755)
    real = tmp_path / "elsewhere.py"
    os.replace(root / LOSS, real)
    (root / LOSS).symlink_to(real)
    checkout = find_checkout(root)
    before = real.read_bytes()
    bring(checkout, "loss")
    assert (root / SCRIPT).stat().st_mode & 0o777 == 0o755
    assert (root / LOSS).is_symlink()
    assert b"GanLoss" in real.read_bytes()
    bring(checkout)
    assert (root / SCRIPT).stat().st_mode & 0o777 == 0o755
    assert real.read_bytes() == before


@pytest.mark.parametrize("command", ["revert", "apply"])
def test_a_file_edited_since_is_refused_and_nothing_is_written(
    build, snapshot, command: str
) -> None:
    root = build()
    run("apply", root)
    with (root / LOSS).open("a") as file:
        file.write("# mine\n")
    edited = snapshot(root)
    output = run(command, root, status=1)
    assert output == (
        "Error: training/loss.py changed since the last apply; undo that change, or take the "
        "original from .rlo-stylegan/originals and remove .rlo-stylegan to start over\n"
    )
    assert snapshot(root) == edited
    assert "training/loss.py  edited since" in run("status", root)
    (root / LOSS).unlink()
    assert "training/loss.py changed since the last apply" in run("revert", root, status=1)


class Stop(BaseException):
    """What a power cut looks like from inside."""


@pytest.mark.parametrize("goes_on", [(), ("loss",), ("compat", "loss")])
@pytest.mark.parametrize("reached", [0, 1, 2, 3])
@pytest.mark.parametrize("direction", ["apply", "revert"])
def test_a_change_stopped_anywhere_can_be_finished_or_taken_back(
    build, snapshot, monkeypatch, direction: str, reached: int, goes_on: tuple[str, ...]
) -> None:
    root = build()
    before = snapshot(root)
    checkout = find_checkout(root)
    first = ("compat", "loss") if direction == "apply" else ()
    if direction == "revert":
        bring(checkout, "compat", "loss")
    real, calls = Ledger._write, 0

    def stopping(self: Ledger, name: str, content: bytes) -> None:
        nonlocal calls
        if calls == reached:
            raise Stop
        calls += 1
        real(self, name, content)

    monkeypatch.setattr(Ledger, "_write", stopping)
    if reached < 3:  # three files change; the third stop is after the last of them
        with pytest.raises(Stop):
            bring(checkout, *first)
    else:
        monkeypatch.setattr(Ledger, "_save", _stop_at_the_second(Ledger._save))
        monkeypatch.setattr(ledger_module.shutil, "rmtree", _raise_stop)
        with pytest.raises(Stop):
            bring(checkout, *first)
    monkeypatch.undo()
    if reached < 3:
        assert "a change was interrupted (files not reached: " in run("status", root)
    bring(checkout, *goes_on)
    if goes_on:
        assert Ledger.load(root).layers == goes_on
        assert Ledger.load(root).coming is None
    bring(checkout)
    assert snapshot(root) == before


def _raise_stop(*arguments: object, **options: object) -> None:
    raise Stop


def _stop_at_the_second(save):
    calls = 0

    def stopping(self: Ledger) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Stop
        save(self)

    return stopping


def test_an_edit_during_an_interrupted_change_is_still_refused(build, monkeypatch) -> None:
    root = build()
    checkout = find_checkout(root)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_write", _raise_stop)
        with pytest.raises(Stop):
            bring(checkout, "loss")
    (root / LOSS).write_text("mine = 1\n")
    with pytest.raises(ChangedError, match=r"^training/loss\.py changed since the last apply"):
        bring(checkout)
    assert (root / LOSS).read_text() == "mine = 1\n"


def test_a_damaged_original_is_never_written_back(build) -> None:
    root = build()
    checkout = find_checkout(root)
    bring(checkout, "loss")
    saved = root / FOLDER / "originals" / LOSS
    saved.write_bytes(b"")
    patched = checkout.read(LOSS)
    with pytest.raises(ChangedError, match="is not the original any more"):
        bring(checkout)
    assert checkout.read(LOSS) == patched


@pytest.mark.parametrize("seed", range(4))
def test_content_depends_on_the_layers_in_force_and_not_on_the_way_there(
    build, snapshot, seed: int
) -> None:
    root = build()
    checkout = find_checkout(root)
    before = snapshot(root)
    states: dict[tuple[str, ...], object] = {}
    draw = random.Random(seed)
    for _ in range(8):
        layers = tuple(layer for layer in ("compat", "loss") if draw.random() < 0.5)
        bring(checkout, *layers)
        now = {n: d for n, d in snapshot(root).items() if not n.startswith(FOLDER)}
        assert states.setdefault(layers, now) == now
    bring(checkout)
    assert snapshot(root) == before


LINE_ENDS = st.sampled_from(["\n", "\r\n"])


@settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    bom=st.booleans(),
    end=LINE_ENDS,
    noise=st.lists(
        st.tuples(
            st.integers(0, 60),
            st.sampled_from(
                ["", "# é ☃", "    # an odd indent", "\t", "   ", "#\f", "# x = 'ü'  "]
            ),
        ),
        max_size=8,
    ),
    last=st.sampled_from(["", "\n", "\n\n\n", "# no line end"]),
)
def test_any_comments_blanks_and_line_ends_survive_the_round_trip(
    build, bom: bool, end: str, noise: list[tuple[int, str]], last: str
) -> None:
    root = build("ada")
    lines = (root / LOSS).read_text().split("\n")
    tops = [i for i, line in enumerate(lines) if line.startswith(("#", "class", "import"))]
    for place, text in noise:
        lines.insert(tops[place % len(tops)], text)
    source = (end.join(lines) + last.replace("\n", end)).encode()
    (root / LOSS).write_bytes((b"\xef\xbb\xbf" if bom else b"") + source)
    before = (root / LOSS).read_bytes()
    checkout = find_checkout(root)
    bring(checkout, "loss")
    patched = (root / LOSS).read_bytes()
    ast.parse(patched)
    untouched = [line for line in before.split(b"\n") if line.strip().startswith(b"#")]
    assert [line for line in patched.split(b"\n") if line.strip().startswith(b"#")] == untouched
    bring(checkout)
    assert (root / LOSS).read_bytes() == before


def test_status_names_the_family_and_what_is_in_force(build) -> None:
    root = build("vision-aided")
    assert f"{root} (stylegan2-ada-pytorch): nothing in force\n" == run("status", root)
    run("apply", root, "--compat")
    document = json.loads(run("status", root, "--json"))
    assert document["layers"] == ["compat", "loss"]
    assert document["files"] == ["torch_utils/misc.py", "train.py", "training/loss.py"]
    assert document["changed"] == []
    assert document["interrupted"] is False
    assert "left in force: compat" in run("revert", root, "--only", "loss")
    assert json.loads(run("status", root, "--json"))["files"] == ["torch_utils/misc.py"]


def test_the_record_is_not_seen_by_git(build) -> None:
    root = build()
    run("apply", root)
    assert (root / FOLDER / ".gitignore").read_text() == "*\n"
