"""What is refused, with the words that say what was looked for and found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rlo_stylegan.checkout import LOSS, find_checkout
from rlo_stylegan.errors import CheckoutError
from rlo_stylegan.layers import plan

LOOKED = (
    "training/loss.py is not understood: looked in accumulate_gradients for three terms, "
    "softplus(-logits) of the generator and softplus(logits) and softplus(-logits) of the "
    "discriminator; found "
)
SCRIPT_LOOKED = (
    "train.py is not understood: looked for one assignment x.loss_kwargs = ... at the top level "
    "of a function that a click command or an argparse main calls with all its options"
)


def refusal(root: Path) -> str:
    before = {path: path.read_bytes() for path in root.rglob("*.py")}
    with pytest.raises(CheckoutError) as error:
        plan(find_checkout(root), ["loss"])
    assert {path: path.read_bytes() for path in root.rglob("*.py")} == before
    return str(error.value)


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))


def test_a_hinge_loss_is_refused_with_the_reason(build) -> None:
    root = build()
    for old, new in [
        ("torch.nn.functional.softplus(-fake_logits)", "-fake_logits"),
        ("torch.nn.functional.softplus(fake_logits)", "relu(torch.ones_like(fake_logits) + 1)"),
        ("torch.nn.functional.softplus(-real_logits)", "F.relu(1 - real_logits)"),
    ]:  # fmt: skip
        edit(root, LOSS, old, new)
    assert refusal(root) == LOOKED + (
        "no softplus; its discriminator loss is a hinge, relu(1 - logits) and relu(1 + logits), as "
        "in projected-gan, stylegan-xl and stylegan-t: that is no function of cross entropy, so a "
        "rooted loss has nothing to replace"
    )


def test_a_relativistic_loss_in_another_file_is_refused_with_the_reason(build) -> None:
    root = build(more={"own/trainer.py": "loss = softplus(-relativistic_logits)\n"})
    edit(root, LOSS, "torch.nn.functional.softplus(", "self.trainer.step(")
    assert refusal(root) == LOOKED + (
        "no softplus; its loss is relativistic (own/trainer.py): softplus of the difference of a "
        "real and a generated logit, as in R3GAN, and not the cross entropy of one decision, so "
        "the rooted loss of the paper does not apply"
    )


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (
            "softplus(-real_logits)",
            "relu(-real_logits)",
            "line 25: torch.nn.functional.softplus(-fake_logits); "
            "line 30: torch.nn.functional.softplus(fake_logits)",
        ),
        (
            "softplus(-real_logits)",
            "softplus(-real_logits, beta=2)",
            "line 25: torch.nn.functional.softplus(-fake_logits); "
            "line 30: torch.nn.functional.softplus(fake_logits); "
            "line 34: torch.nn.functional.softplus(-real_logits, beta=2)",
        ),
        (
            "softplus(-fake_logits) # fool D",
            "softplus(fake_logits) # fool D",
            "line 25: torch.nn.functional.softplus(fake_logits); "
            "line 30: torch.nn.functional.softplus(fake_logits); "
            "line 34: torch.nn.functional.softplus(-real_logits)",
        ),
    ],
    ids=["two terms", "another softplus", "another sign"],
)
def test_terms_of_another_number_or_shape_are_listed(build, old: str, new: str, found: str) -> None:
    root = build()
    edit(root, LOSS, old, new)
    assert refusal(root) == LOOKED + found


def test_a_fourth_term_is_refused(build) -> None:
    root = build()
    edit(
        root,
        LOSS,
        "            d_real = ",
        "            extra = F.softplus(-real_logits)\n            d_real = ",
    )
    assert "line 34: F.softplus(-real_logits)" in refusal(root)


def test_softplus_outside_the_method_is_left_alone(build) -> None:
    root = build(more={"training/ray_marcher.py": "def f(d):\n    return F.softplus(d - 1)\n"})
    planned = plan(find_checkout(root), ["loss"])
    assert planned.files == ["train.py", LOSS]
    assert b"def softplus(x):\n    return x\n" in planned.after[LOSS]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("'training.loss.TinyLoss'", "'training.loss.Other'",
         "training/loss.py has no class 'Other', which train.py names"),
        ("'training.loss.TinyLoss'", "'elsewhere.TinyLoss'",
         "train.py must name one class of training/loss.py as 'training.loss.NAME', found none"),
        ("args.loss_kwargs = dnnlib.EasyDict(", "args.loss_options = dnnlib.EasyDict(",
         f"{SCRIPT_LOOKED}; found none"),
        ("setup_training_loop_kwargs(**config_kwargs)", "setup_training_loop_kwargs(steps=1)",
         f"{SCRIPT_LOOKED}; found it in setup_training_loop_kwargs(), and 1 click commands and 0 "
         "argument parsers, none of which hands it all its options"),
        ("'--gamma'", "'--kparam'",
         "train.py has an option --kparam of its own; a checkout that was patched by hand for "
         "another loss has to be restored first"),
        ("# Options by hand.", "import rlo_stylegan",
         "train.py names rlo_stylegan, but no apply is on record; restore the file first"),
        ("# Options by hand.", "print 'Python 2'", "train.py does not parse as Python (line 1)"),
    ],
    ids=["class", "no class", "no loss_kwargs", "not handed on", "taken", "patched", "syntax"],
)  # fmt: skip
def test_a_script_of_another_shape_is_refused(build, old: str, new: str, message: str) -> None:
    root = build()
    edit(root, "train.py", old, new)
    assert refusal(root) == message


def test_a_class_without_a_constructor_is_refused(build) -> None:
    root = build()
    edit(root, LOSS, "def __init__", "def set_up")
    assert refusal(root) == (
        "class 'TinyLoss' of training/loss.py has no __init__ of its own to take the loss"
    )


def test_a_folder_that_is_no_checkout_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckoutError) as error:
        find_checkout(tmp_path)
    assert str(error.value) == (
        f"{str(tmp_path)!r} is no StyleGAN checkout: looked for train.py and training/loss.py "
        "there and one folder below, found neither"
    )
    with pytest.raises(CheckoutError, match=re.escape("must be a folder, got ")):
        find_checkout(tmp_path / "nowhere")


def test_a_checkout_one_folder_down_is_found_and_two_have_to_be_named(
    build, tmp_path: Path
) -> None:
    one = build(folder="repo/eg3d")
    assert find_checkout(tmp_path / "repo").root == one.resolve()
    assert find_checkout(one / "train.py").root == one.resolve()
    build(folder="repo/other")
    with pytest.raises(CheckoutError) as error:
        find_checkout(tmp_path / "repo")
    assert str(error.value) == (
        f"{str(tmp_path / 'repo')!r} holds more than one checkout (eg3d, other); name one of them"
    )
