"""The README.md of a quantized model: what it is, and above all how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlo_gptq.bit_rules import described
from rlo_gptq.settings import LayerSettings

_TEMPLATE = """---
library_name: transformers
{base_line}tags:
- rlo-gptq
- quantized
- {tag}
---

# {name}, {bits} bits

{base} quantized with rlo-gptq {version}: method `{method}`, incoherence {incoherence}, group size
{group_size}, calibrated on `{dataset}`. Weight files: {megabytes:.1f} MB.

## Loading

The weights are packed: the package `rlo-gptq` must be installed and imported, otherwise
transformers refuses the shapes of the packed tensors.

```python
import rlo_gptq  # registers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/folder")
tokenizer = AutoTokenizer.from_pretrained("this/folder")
```

or, with every file checked first, `model = rlo_gptq.load("this/folder")`. Do not pass
`ignore_mismatched_sizes=True` to a transformers that lacks the package: the model would be random.

## Error of the layers

Relative proxy loss tr((W - What) H (W - What)^T) / tr(W H W^T), original basis, undamped: mean
{mean:.4g}, worst {worst:.4g} at `{worst_layer}`.

| layer | shape | proxy loss |
|---|---|---|
{rows}
"""


def model_card(
    *,
    base: str,
    dataset: str,
    settings: LayerSettings,
    size: int,
    records: Sequence[dict[str, Any]],
    version: str,
    folded: bool = False,
) -> str:
    """Return the model card.

    Args:
        base: Name of the original model; only its last part is shown if it is a path.
        dataset: Calibration data, likewise.
        settings: Of the layers.
        size: Bytes of the weight files.
        records: One for each layer, with `layer`, `rows`, `columns` and `proxy`.
        version: Of rlo-gptq.
        folded: Whether random rotations were folded into the weights first.
    """
    hub = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    shown = base if hub else base.rstrip("/").rpartition("/")[2]
    worst = sorted(records, key=lambda record: -float(record["proxy"]))[:10]
    mean = sum(float(record["proxy"]) for record in records) / max(1, len(records))
    rows = "\n".join(
        f"| `{r['layer']}` | {r['rows']} x {r['columns']} | {float(r['proxy']):.5f} |"
        for r in worst
    )
    widths = [int(r.get("bits", settings.bits)) for r in records] or [settings.bits]
    kinds = ["rotations folded into the weights (`--rotate fold`)"] if folded else []
    kinds += [f"`{settings.incoherence}`"] if settings.incoherence != "none" else []
    return _TEMPLATE.format(
        base_line=f"base_model: {base}\n" if hub else "",
        base=f"`{shown}`",
        name=shown,
        bits=described(widths),
        tag=f"{settings.bits}-bit" if len(set(widths)) == 1 else "mixed-precision",
        version=version,
        method=settings.method,
        incoherence=" and ".join(kinds) or "`none`",
        group_size=settings.group_size,
        dataset=dataset.rstrip("/").rpartition("/")[2],
        megabytes=size / 1e6,
        mean=mean,
        worst=float(worst[0]["proxy"]) if worst else 0.0,
        worst_layer=worst[0]["layer"] if worst else "none",
        rows=rows,
    )
