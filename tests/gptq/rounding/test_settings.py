"""Settings check themselves and survive a round trip through JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from rlo_gptq.settings import LayerSettings


def test_settings_survive_json():
    settings = LayerSettings(bits=3, method="gptq", group_size=128, npasses=4, percdamp=0.02)
    assert LayerSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("method", "npasses", "unbiased", "passes"),
    [
        ("ldlqRG", None, False, 10),
        ("allbal", None, False, 10),
        ("gptq", None, False, 0),
        ("gptq", 3, False, 3),
        ("ldlqRG", 0, False, 0),
        ("ldlqRG", None, True, 0),
    ],
)
def test_passes_default_to_what_pays(method, npasses, unbiased, passes):
    assert LayerSettings(method=method, npasses=npasses, unbiased=unbiased).passes == passes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"bits": 2.0}, "bits must be one of 2, 3, 4, 5, 6, 8, got 2.0"),
        ({"group_size": -2}, "group_size must be -1, 0 or positive, got -2"),
        ({"percdamp": -1.0}, "percdamp must be finite and at least 0, got -1.0"),
        ({"percdamp": float("nan")}, "percdamp must be finite and at least 0, got nan"),
        ({"npasses": -1}, "npasses must be at least 0, got -1"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"unbiased": True, "npasses": 2}, "npasses must be 0 with unbiased rounding, got 2"),
        ({"grid": "trellis", "bits": 8}, "bits must be one of 1, 2, 3, 4, got 8"),
        (
            {"grid": "trellis:L=16", "sym": False},
            "sym must be True with grid 'trellis:L=16', got False",
        ),
        ({"bits": 1}, "bits must be one of 2, 3, 4, 5, 6, 8, got 1"),
        (
            {"grid": "trellis:L=11"},
            "grid must be one of 'scalar', 'trellis', 'trellis:L=12', 'trellis:L=14', "
            "'trellis:L=16', got 'trellis:L=11'",
        ),
        ({"grid": "trellis", "sym": False}, "sym must be True with grid 'trellis', got False"),
        (
            {"grid": "trellis", "integer_zero": True},
            "integer_zero must be False with grid 'trellis', got True",
        ),
        (
            {"grid": "trellis", "method": "ldlbal_admm"},
            "method must not be 'ldlbal_admm' with grid 'trellis'; use 'ldlqRG'",
        ),
        ({"compat": "quip", "group_size": 64}, "group_size must be -1 with compat 'quip', got 64"),
        (
            {"compat": "quip", "integer_zero": True},
            "compat 'quip' has two grids, sym without integer_zero (qfn b) and integer_zero "
            "without sym (qfn a), got sym=True and integer_zero=True",
        ),
    ],
)
def test_a_wrong_setting_is_refused(options, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        LayerSettings(**options)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "gptqq"}, "method must be one of 'nearest', 'gptq', 'ldlq', 'ldlqRG', "
         "'allbal', 'ldlbal_admm', got 'gptqq'"),
        ({"sym": 1}, "sym must be bool, got 1"),
        ({"npasses": "3"}, "npasses must be int or None, got '3'"),
        ({"group_size": True}, "group_size must be int, got True"),
        ({"percdamp": None}, "percdamp must be float, got None"),
    ],
)  # fmt: skip
def test_a_saved_value_of_the_wrong_type_is_refused(values, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        LayerSettings.from_dict(values)
    assert str(refused.value) == message


def test_an_unknown_setting_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"^unknown setting 'xyzzy'; available: act_order, bits, "):
        LayerSettings.from_dict({"xyzzy": 3})
    with pytest.raises(
        ValueError, match=r"^unknown setting 'bit'; did you mean 'bits'\? available: "
    ):
        LayerSettings.from_dict({"bit": 3})


def test_settings_import_no_torch():
    program = "import sys, rlo_gptq.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
