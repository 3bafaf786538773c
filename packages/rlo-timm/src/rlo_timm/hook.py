"""The slot without a launcher: `python train.py --device-modules rlo_timm.hook -c rlo.yaml`.

From v0.9.16 on train.py imports the modules that `--device-modules` names, inside `main()` and
right after it has parsed its options. Imported there, this module runs the same script again
through the launcher, with the same arguments, and ends the process with it: one transform, two ways
in. `loss` has to come from the YAML file, because the first parse knows no `--loss`.
"""

from __future__ import annotations

import logging
import sys

from rlo_core.launch import ScriptError, run_script

from rlo_timm.launcher.train_script import SLOT, transform


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
    run_script(path, sys.argv[1:], transform=transform)
    raise SystemExit(0)


_rerun()
