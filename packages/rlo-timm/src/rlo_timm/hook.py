"""The slot without a launcher: `python train.py --device-modules rlo_timm.hook -c rlo.yaml`.

From v0.9.16 on train.py imports the modules that `--device-modules` names, inside `main()` and
right after it has parsed its options. Imported there, this module runs the same script again
through the launcher, with the same arguments, and ends the process with it: one transform, two ways
in. `loss` comes from the YAML file, because the first parse knows no `--loss`; or, and from timm
1.0.30 on only so, because that release refuses names in the file that it does not know, from the
environment: `RLO_LOSS=rlo:k=8,m=10 python train.py --device-modules rlo_timm.hook ...`.
"""

from __future__ import annotations

import logging
import os
import sys

from rlo_core.launch import ScriptError, run_script

from rlo_timm._compat import actions_of
from rlo_timm.launcher.train_script import SLOT, transform

SPEC_VARIABLE = "RLO_LOSS"
"""The environment variable that gives the loss where a YAML file cannot."""


def _rerun() -> None:
    main = sys.modules["__main__"]
    if hasattr(main, SLOT):  # `timm train.py --device-modules rlo_timm.hook`: the slot is open
        return
    path = getattr(main, "__file__", None)
    if path is None or not hasattr(main, "parser"):
        raise ScriptError(
            "rlo_timm.hook is for `python train.py --device-modules rlo_timm.hook -c FILE.yaml`, "
            f"got an import from {path!r}"
        )
    # The first main() has set up logging, and the second will: every line would come twice.
    for handler in logging.root.handlers[:]:
        if type(handler.formatter).__name__ == "FormatterNoInfo":
            logging.root.removeHandler(handler)
    argv = sys.argv[1:]
    spec = os.environ.get(SPEC_VARIABLE)
    if spec:
        own = any("--loss" in action.option_strings for action in actions_of(main.parser))
        argv += ["--rlo-loss" if own else "--loss", spec]
    run_script(path, argv, transform=transform)
    raise SystemExit(0)


_rerun()
