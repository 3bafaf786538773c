"""One record of options: as arguments of an operator and back."""

from __future__ import annotations

import pytest
import torch
from rlo_core.linear.settings import NAMES, SCHEMA, Settings
from rlo_core.links import CE, Link, Rooted, RootedConvex


def test_the_schema_names_every_field_in_order():
    assert [part.split()[-1] for part in SCHEMA.split(", ")] == list(NAMES)
    operator = torch.ops.rlo_core.linear_loss_rows.default._schema
    assert [argument.name for argument in operator.arguments][-len(NAMES) :] == list(NAMES)


@pytest.mark.parametrize("link", [CE(), Rooted(5.0), Rooted(3.0, 2.0), RootedConvex(4.0)], ids=str)
def test_settings_come_back_from_their_arguments_with_the_link(link: Link):
    settings = Settings(torch.bfloat16, 7, first_class=3, softcap=30.0, rows=9).with_link(link)
    back = Settings.of(settings.arguments())
    assert back == settings
    assert back.decoded() == link


def test_a_gradient_is_wanted_where_it_is_recorded():
    hidden, weight = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 3)
    settings = Settings(torch.float32, 4).with_grads(hidden, weight, None)
    assert (settings.hidden_grad, settings.weight_grad, settings.bias_grad) == (True, False, False)
    assert settings.any_grad
    assert not settings.without_grads().any_grad
    with torch.no_grad():
        assert not settings.with_grads(hidden, weight, None).any_grad
