"""Spec strings and entry points, with small real distributions on a path of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from rlo_core import (
    PluginError,
    SpecError,
    available_losses,
    create_binary_loss,
    create_loss,
    link_binary_cross_entropy,
    link_cross_entropy,
    link_of,
    parse_spec,
)
from rlo_core.links import RootedConvex
from rlo_core.registry import LossSpec, load_factory, loss_options

LINKS = ["agce", "ce", "dft", "focal", "gce", "poly1", "rlo", "rlo-convex", "sce"]
OURS = sorted([*LINKS, "anl", "jal", "smooth-ce", "tempered-ce"])
LIST = ", ".join(OURS)


def test_our_own_losses_come_through_the_entry_points() -> None:
    assert [name for name, package in available_losses().items() if "rlo-core" in package] == OURS


@pytest.mark.parametrize("name", LINKS)
def test_each_of_our_links_is_made_called_and_has_a_link(name: str) -> None:
    criterion = create_loss(name, reduction="sum", ignore_index=-1, label_smoothing=0.1)
    logits = torch.randn(3, 4, requires_grad=True)
    criterion(logits, torch.tensor([0, -1, 2])).backward()
    assert link_of(criterion) is not None


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("rlo", "rlo", {}),
        ("rlo:k=8,m=10", "rlo", {"k": "8", "m": "10"}),
        (" rlo : k = 8 , m=None ", "rlo", {"k": "8", "m": "None"}),
        ("rlo:k=inf", "rlo", {"k": "inf"}),
    ],
)
def test_a_spec_is_a_name_and_options(text: str, name: str, options: dict[str, str]) -> None:
    spec = parse_spec(text)
    assert (spec.name, dict(spec.options)) == (name, options)
    assert parse_spec(str(spec)) == spec
    assert parse_spec(spec) is spec


@pytest.mark.parametrize("text", ["", ":k=3", "rlo:", "rlo:k", "rlo:k=", "rlo:=3", "rlo:k=3,", " "])
def test_a_malformed_spec_is_shown_with_the_form_it_must_have(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        create_loss(text)
    assert str(caught.value) == f"loss spec must be NAME or NAME:option=value,..., got {text!r}"


def message_of(call: Callable[[], object], kind: type[Exception] = SpecError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_an_unknown_name_gets_a_suggestion_and_the_list() -> None:
    assert message_of(lambda: create_loss("rol")) == (
        f"unknown loss 'rol'; did you mean 'rlo'? available: {LIST} (rlo-core 0.1.0)"
    )
    assert message_of(lambda: create_loss("hinge")) == (
        f"unknown loss 'hinge'; available: {LIST} (rlo-core 0.1.0)"
    )


def test_an_unknown_option_gets_those_that_there_are() -> None:
    assert message_of(lambda: create_loss("gce:k=3")) == (
        "loss 'gce' takes no option 'k'; it takes q"
    )
    assert message_of(lambda: create_loss("rlo:gamma=2")) == (
        "loss 'rlo' takes no option 'gamma'; it takes k, m, warmup, schedule, k_start"
    )
    assert message_of(lambda: create_loss("dft:k=1")) == (
        "loss 'dft' takes no option 'k'; it takes none"
    )
    # What the host sets is no option of the spec.
    assert "takes no option 'reduction'" in message_of(lambda: create_loss("rlo:reduction=sum"))


def test_a_value_that_is_no_number_or_is_refused_names_the_option() -> None:
    assert message_of(lambda: create_loss("rlo:k=three")) == (
        "option 'k' of loss 'rlo' must be a number, got 'three'"
    )
    assert message_of(lambda: create_loss("rlo:m=x")) == (
        "option 'm' of loss 'rlo' must be a number or none, got 'x'"
    )
    assert message_of(lambda: create_loss("rlo:k=0")) == (
        "loss 'rlo:k=0': k must be positive, got 0.0"
    )
    assert message_of(lambda: create_loss("rlo:k=nan")) == (
        "loss 'rlo:k=nan': k must be positive, got nan"
    )
    assert message_of(lambda: create_loss("rlo:k=3,k=4")) == (
        "loss spec 'rlo:k=3,k=4' gives option 'k' twice"
    )
    assert message_of(lambda: create_loss(3)) == (  # type: ignore[arg-type]
        "loss must be a spec string such as 'rlo:k=8,m=10', got 3"
    )


def test_flags_join_a_spec_unless_they_contradict_it() -> None:
    spec = parse_spec("rlo:k=8")
    assert str(spec.with_options(m=10.0)) == "rlo:k=8,m=10"
    assert str(spec.with_options(k=8.0)) == "rlo:k=8"
    assert message_of(lambda: spec.with_options(k=5.0)) == (
        "option 'k' is given twice, as 8 in 'rlo:k=8' and as 5"
    )
    assert str(LossSpec("ce")) == "ce"


@pytest.mark.usefixtures("good_plugin")
def test_a_foreign_loss_is_used_like_our_own() -> None:
    assert available_losses()["square-root"] == "good-losses 2.0"
    criterion = create_loss("square-root:scale=2,steep=true,name=none", reduction="none")
    logits, target = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, 2, -100, 1])
    ce = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(criterion(logits, target), 4.0 * ((1 + 2 * ce).sqrt() - 1.0))
    link = link_of(criterion)
    assert link is not None
    # Its link brings all forms: smoothing, half precision, binary targets, the fused linear loss.
    link_cross_entropy(logits.bfloat16(), target, link, label_smoothing=0.1).backward()
    binary = create_binary_loss("square-root")
    found = binary(torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(
        found, link_binary_cross_entropy(torch.zeros(3), torch.ones(3), binary.criterion.link)
    )
    assert list(loss_options("square-root")) == ["scale", "steep", "name"]


@pytest.mark.usefixtures("good_plugin")
def test_a_foreign_loss_that_is_no_function_of_cross_entropy_works_where_it_can() -> None:
    criterion = create_loss("margin", reduction="sum")
    assert link_of(criterion) is None
    assert criterion(torch.eye(3) * 5.0, torch.arange(3)).item() == 0.0
    assert message_of(lambda: create_binary_loss("margin")) == (
        "loss 'margin' has no link, so it has no binary form"
    )
    assert message_of(lambda: create_loss("margin", label_smoothing=0.1)) == (
        "loss 'margin' cannot honour label_smoothing=0.1; its factory has no such option"
    )


@pytest.mark.usefixtures("bad_plugin")
def test_a_broken_plugin_breaks_only_its_own_name() -> None:
    assert {"bad", "odd", *OURS} <= set(available_losses())
    create_loss("rlo")
    assert message_of(lambda: create_loss("bad"), PluginError) == (
        "loss 'bad' from bad-losses 1.0 failed to import (ZeroDivisionError: division by zero); "
        "`rlo doctor` checks every plugin"
    )
    assert message_of(lambda: create_loss("odd"), PluginError) == (
        "loss 'odd' from bad-losses 1.0 must be a callable that returns a module, got int"
    )


@pytest.mark.usefixtures("good_plugin")
def test_a_name_that_two_packages_claim_is_an_error_for_that_name_only(
    install: Callable[..., None],
) -> None:
    install(
        "other-losses",
        "3.1",
        {"plugin_other": "from plugin_good import square_root\n"},
        {"rlo_core.losses": {"square-root": "plugin_other:square_root"}},
    )
    words = message_of(lambda: create_loss("square-root"), PluginError)
    assert words in (
        "loss 'square-root' is registered by other-losses 3.1 and by good-losses 2.0; "
        "uninstall one of them",
        "loss 'square-root' is registered by good-losses 2.0 and by other-losses 3.1; "
        "uninstall one of them",
    )
    create_loss("margin")


def test_the_binary_form_of_a_spec_is_its_link_on_each_logit() -> None:
    binary = create_binary_loss("rlo-convex:k=2", pos_weight=torch.tensor(2.0), reduction="sum")
    logits, target = torch.randn(4), torch.rand(4)
    expected = link_binary_cross_entropy(
        logits, target, RootedConvex(2.0), pos_weight=torch.tensor(2.0), reduction="sum"
    )
    torch.testing.assert_close(binary(logits, target), expected)


def test_listing_imports_no_torch() -> None:
    program = (
        "import sys, json, rlo_core; names = list(rlo_core.available_losses());"
        "rlo_core.parse_spec('rlo:k=8'); print(json.dumps([names, 'torch' in sys.modules]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert json.loads(output) == [OURS, False]


def test_a_factory_is_a_plain_callable() -> None:
    assert callable(load_factory("rlo"))
