"""The doctor finds what does not run, and --compat repairs what it can, reversibly."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rlo_stylegan import repairs
from rlo_stylegan.checkout import find_checkout
from rlo_stylegan.cli import main
from rlo_stylegan.compat import repair
from rlo_stylegan.doctor import examine

CASES = {
    repairs.SamplerArgument: (
        """
        class Endless(torch.utils.data.Sampler):
            def __init__(self, dataset):
                super().__init__(dataset)  # as torch wanted

        class Other(Base):
            def __init__(self, dataset):
                super().__init__(dataset)
        """,
        {"super().__init__(dataset)  # as": "super().__init__()  # as"},
    ),
    repairs.PluginModule: (
        """
        def get(name, sources, **options):
            try:
                if len(sources) == 1:
                    torch.utils.cpp_extension.load(name=name, sources=sources, **options)
                else:
                    torch.utils.cpp_extension.load(name=name,
                        sources=sources)
                module = importlib.import_module(name)
            except OSError:
                raise
            return module

        def named(name):
            module = importlib.import_module(name)
            return module
        """,
        {
            "torch.utils.cpp_extension.load(": "module = torch.utils.cpp_extension.load(",
            "                module = importlib.import_module(name)\n": "",
        },
    ),
    repairs.ParseVersion: (
        "from pkg_resources import parse_version  # versions\n",
        {"pkg_resources import parse_version": "packaging.version import parse as parse_version"},
    ),
    repairs.NumpyAlias: (
        "import numpy as np\nx = np.zeros(3, dtype=np.float)\n"
        "y = np.product(x)\nz = np.float32(1)\n",
        # np.product went with NumPy 2.
        {"np.float)": "float)", **({} if "product" in vars(np) else {"np.product": "np.prod"})},
    ),
    repairs.PillowAlias: (
        "import PIL.Image\nsmall = image.resize((8, 8), PIL.Image.ANTIALIAS)\n",
        {"ANTIALIAS": "LANCZOS"},
    ),
    repairs.SqrtmPair: (
        "s, _ = scipy.linalg.sqrtm(np.dot(a, b), disp=False) # root\n",
        {"s, _ =": "s =", ", disp=False": ""},
    ),
    repairs.AdamBetas: (
        "o = EasyDict(class_name='torch.optim.Adam', betas=[0,0.99], eps=1e-8)\n",
        {"[0,0.99]": "[0.0,0.99]"},
    ),
    repairs.SharedBuffers: (
        """
        for name, module in modules:
            if num_gpus > 1:
                # wrapped
                module = DDP.DistributedDataParallel(module, broadcast_buffers=False)
        """,
        {
            "                # wrapped\n": "                # wrapped\n"
            "                for buffer in module.buffers():\n"
            "                    torch.distributed.broadcast(buffer, src=0)\n"
        },
    ),
}


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.title)
def test_a_repair_changes_what_it_names_and_nothing_else(kind: type[repairs.Repair]) -> None:
    source, changes = CASES[kind]
    wanted = source
    for old, new in changes.items():
        wanted = wanted.replace(old, new)
    repaired, places = repair(dedent(source).encode(), "x.py", [kind])
    assert repaired.decode() == dedent(wanted)
    assert places
    again, more = repair(repaired, "x.py", [kind])
    assert again == repaired
    assert more == []


def test_strtobool_is_written_out_and_answers_as_distutils_did() -> None:
    source = b"import os\n# truth\nfrom distutils.util import strtobool\nx = strtobool('Yes')\n"
    repaired, _ = repair(source, "x.py", [repairs.StrToBool])
    assert b"distutils" not in repaired
    assert b"# truth\ndef strtobool(text):" in repaired
    names: dict[str, object] = {}
    exec(compile(ast.parse(repaired), "x.py", "exec"), names)
    assert names["x"] == 1
    strtobool = names["strtobool"]
    assert strtobool("off") == 0  # type: ignore[operator]
    with pytest.raises(ValueError, match="invalid truth value 'maybe'"):
        strtobool("maybe")  # type: ignore[operator]


def test_a_name_that_numpy_still_has_is_left_alone() -> None:
    old = "bool" if "bool" in vars(np) else "product"  # which NumPy 2 has again, or 1 has still
    source = f"import numpy as np\nx = np.{old}(1), np.int64(2), self.np.float\n".encode()
    assert repair(source, "x.py", [repairs.NumpyAlias]) == (source, [])


def test_whether_adam_needs_it_is_asked_of_adam() -> None:
    try:
        torch.optim.Adam([torch.zeros(1, requires_grad=True)], betas=(0, 0.99))
    except ValueError:
        assert repairs.AdamBetas.needed()
    else:
        assert not repairs.AdamBetas.needed()


@pytest.mark.filterwarnings("ignore:`data_source` argument is not used")
def test_whether_a_sampler_needs_it_is_asked_of_torch() -> None:
    try:
        torch.utils.data.Sampler([1])
    except TypeError:
        assert repairs.SamplerArgument.needed()
    else:
        assert not repairs.SamplerArgument.needed()


PROBLEMS = {
    "training/extra.py": """
        import numpy as np
        import torch
        import no_such_package
        from numpy.linalg import no_such_function
        try:
            import another_missing_one
        except ImportError:
            pass

        def f(x):
            return np.no_such_name(x) + np.float(x) + torch.nn.functional.softplus(x)
        """,
    "viewer.py": "import no_such_viewer\n",
    "training/old.py": "print 'Python 2'\n",
}


@pytest.mark.usefixtures("sampler_repair")
def test_the_doctor_lists_what_stops_a_run_first(build) -> None:
    found = {f.where: f for f in examine(find_checkout(build(more=PROBLEMS)))}
    assert found["training/old.py:1"].what.startswith("does not parse: ")
    assert found["training/extra.py:3"].what == "package 'no_such_package' is not installed"
    assert found["training/extra.py:4"].what == (
        "numpy.linalg.no_such_function does not exist any more"
    )
    # One line for both: the repair hides what it repairs, not what is beside it.
    assert found["training/extra.py:11"].repair == "numpy"
    assert (found["viewer.py:1"].level, found["viewer.py:1"].repair) == ("note", "")
    assert found["torch_utils/misc.py:5"].repair == "sampler"
    assert "training/extra.py:6" not in found
    levels = [f.level for f in examine(find_checkout(build(more=PROBLEMS)))]
    assert levels == sorted(levels, key=["stops", "slow", "note"].index)


@pytest.mark.usefixtures("sampler_repair")
def test_the_command_repairs_reversibly_and_its_status_says_what_is_left(build, snapshot) -> None:
    root = build()
    before = snapshot(root)

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, [*arguments, str(root)])
        return result.exit_code, result.output

    status, output = run("doctor")
    assert status == 1
    assert "Sampler takes no data set any more: training stops with a TypeError" in output
    assert run("doctor", "--compat", "--diff")[1].count("+        super().__init__()  # what") == 1
    assert snapshot(root) == before
    status, output = run("doctor", "--compat")
    assert status == 0
    assert "torch_utils/misc.py" in output
    findings = json.loads(run("doctor", "--json")[1])
    assert "sampler" not in [finding["repair"] for finding in findings]
    assert "nothing to repair" in run("doctor", "--compat")[1]
    run("revert")
    assert snapshot(root) == before


@pytest.mark.usefixtures("sampler_repair")
def test_compat_and_loss_can_be_taken_back_in_any_order(build, snapshot) -> None:
    root = build()
    before = snapshot(root)
    invoke = CliRunner().invoke
    for first, second in (("loss", "compat"), ("compat", "loss")):
        assert invoke(main, ["apply", "--compat", str(root)]).exit_code == 0
        assert invoke(main, ["revert", "--only", first, str(root)]).exit_code == 0
        assert invoke(main, ["revert", "--only", second, str(root)]).exit_code == 0
        assert snapshot(root) == before


@pytest.mark.usefixtures("sampler_repair")
def test_a_checkout_that_trains_again_after_compat(build, tmp_path: Path) -> None:
    """The repaired class is the one that torch's Sampler accepts."""
    root = build()
    assert CliRunner().invoke(main, ["doctor", "--compat", str(root)]).exit_code == 0
    names: dict[str, type] = {}
    source = (root / "torch_utils" / "misc.py").read_text()
    exec(compile(source, "misc.py", "exec"), names)  # type: ignore[arg-type]
    assert names["EndlessSampler"]([1, 2]).dataset == [1, 2]
