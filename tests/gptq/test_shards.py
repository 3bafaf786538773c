"""The one layout of weight files: joined byte by byte, aligned as the format's own writer does."""

from __future__ import annotations

import json

import pytest
import torch
from rlo_gptq.models.shards import file_bytes, join_files, read_header, save_tensors
from safetensors.torch import load_file

NARROW_FIRST = {
    "a.bool": torch.tensor([True, False, True]),
    "b.uint8": torch.arange(5, dtype=torch.uint8),
    "c.half": torch.arange(3).half(),
    "d.bfloat16": torch.arange(3).bfloat16(),
    "e.float": torch.arange(3).float(),
    "f.int32": torch.arange(3, dtype=torch.int32),
    "g.double": torch.arange(3).double(),
    "h.long": torch.arange(3),
}


@pytest.mark.parametrize("parts", [1, 2, len(NARROW_FIRST)])
def test_a_joined_file_has_every_tensor_at_a_multiple_of_its_item_size(tmp_path, parts):
    files, names = [], list(NARROW_FIRST)
    for i in range(parts):
        files.append(tmp_path / f"{i}.safetensors")
        save_tensors(files[-1], {name: NARROW_FIRST[name] for name in names[i::parts]})
    joined = tmp_path / "joined.safetensors"
    join_files(files, joined)
    header, start = read_header(joined)
    assert set(header) == set(NARROW_FIRST)
    for name, entry in header.items():
        size = NARROW_FIRST[name].element_size()
        assert (start + entry["data_offsets"][0]) % size == 0, name
    found = load_file(joined)
    assert all(torch.equal(found[name], NARROW_FIRST[name]) for name in NARROW_FIRST)
    assert joined.stat().st_size == file_bytes(NARROW_FIRST)


def test_a_joined_file_is_the_formats_own_up_to_its_header(tmp_path):
    """safetensors' writer is the oracle of the order of the bytes."""
    save_tensors(tmp_path / "own.safetensors", NARROW_FIRST)
    join_files([tmp_path / "own.safetensors"], tmp_path / "joined.safetensors")
    data = []
    for name in ("own", "joined"):
        raw = (tmp_path / f"{name}.safetensors").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        assert size % 8 == 0
        header = json.loads(raw[8 : 8 + size])
        header.pop("__metadata__", None)
        widths = [
            NARROW_FIRST[key].element_size()
            for key in sorted(header, key=lambda key: header[key]["data_offsets"])
        ]
        assert widths == sorted(widths, reverse=True)
        data.append(len(raw) - 8 - size)
    assert data[0] == data[1]
