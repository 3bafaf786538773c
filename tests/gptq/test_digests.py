"""What identifies a model: all of its bytes, wherever it lies."""

from __future__ import annotations

import hashlib
import os
import random
import shutil

from rlo_gptq.models import digests
from rlo_gptq.models.source import ModelSource


def test_a_byte_changed_anywhere_changes_the_fingerprint_and_a_move_does_not(
    model_folder, tmp_path
):
    model = model_folder("llama-gqa-tied")
    before = ModelSource(model).fingerprint()
    moved = shutil.copytree(model, tmp_path / "moved")
    assert ModelSource(moved).fingerprint() == before
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    draw = random.Random(0)
    for _ in range(5):
        at = draw.randrange(len(data) // 2, len(data))  # behind the header
        data[at] ^= 1
        weights.write_bytes(data)
        assert ModelSource(moved).fingerprint() != before
        data[at] ^= 1


def test_the_digest_of_a_large_file_is_kept_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "KEPT_FROM", 10)
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"a" * 20)
    found = digests.kept_digest(file, cache=cache)
    assert found == hashlib.sha256(b"a" * 20).hexdigest()
    (kept,) = (cache / "digests").iterdir()
    kept.write_text("0" * 64)  # proves that the next call reads it
    assert digests.kept_digest(file, cache=cache) == "0" * 64
    os.utime(file, ns=(1, 1))
    assert digests.kept_digest(file, cache=cache) == found
    kept.write_text("no digest")
    os.utime(file, ns=(2, 2))
    assert digests.kept_digest(file, cache=tmp_path / "weights") == found  # no folder: no error
