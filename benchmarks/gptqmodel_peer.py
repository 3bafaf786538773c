"""Quantize a model with GPTQModel, in the environment that has it; started by `bench_gptqmodel.py`.

    PEER_PYTHON benchmarks/gptqmodel_peer.py REQUEST.json

REQUEST.json: model, out, tokens (file of a JSON list of lists), bits, group_size, skip, options.
Prints one JSON line: seconds from reading the model to the saved checkpoint, imports left out.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    import gptqmodel
    import torch

    torch.set_num_threads(1)
    sequences = json.loads(Path(request["tokens"]).read_text())
    begin, begin_cpu = time.perf_counter(), time.process_time()
    patterns = [re.escape(name).replace(r"\*", ".*") for name in request["skip"]]
    skipped: dict[str, dict[str, int]] = {f"-:{pattern}$": {} for pattern in patterns}
    config = gptqmodel.QuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        sym=True,
        dynamic=skipped or None,
        **request["options"],
    )
    model = gptqmodel.GPTQModel.load(
        request["model"], config, dtype=torch.float32, device="cpu", backend=gptqmodel.BACKEND.AUTO
    )
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in sequences]
    model.quantize(calibration, batch_size=1, backend=gptqmodel.BACKEND.GPTQ_TORCH)
    model.save(request["out"])
    measured = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - begin_cpu,
        "version": gptqmodel.__version__,
        "options": config.to_dict(),
    }
    print("\nPEER " + json.dumps(measured, default=str))


if __name__ == "__main__":
    main()
