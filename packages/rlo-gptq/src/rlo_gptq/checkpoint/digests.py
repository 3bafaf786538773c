"""A checkpoint's files held against the digests that were noted when they were written."""

from __future__ import annotations

from pathlib import Path

from rlo_gptq.checkpoint.validation import CheckpointError, read_object, require
from rlo_gptq.models.digests import DIGESTS, file_digest, tensor_digests, verifying


def check_digests(folder: Path) -> None:
    """Refuse a checkpoint of which a file is not what was written.

    One without digests, which an older version or another tool made, passes. Digests find damage
    and edits, not a forger: who changes a file can change its digest.

    Raises:
        CheckpointError: names the tensor, or else the file.
    """
    if not verifying() or not (folder / DIGESTS).is_file():
        return
    document = read_object(folder / DIGESTS)
    files, tensors = document.get("files"), document.get("tensors")
    good = isinstance(files, dict) and isinstance(tensors, dict)
    require(good, f"{DIGESTS} of {str(folder)!r} must have files and tensors; delete it to go on")
    assert isinstance(files, dict)
    assert isinstance(tensors, dict)
    for name, digest in files.items():
        path = folder / name
        require(Path(name).name == name, f"{DIGESTS} names {name!r}, which is no file's name")
        require(path.is_file(), f"{str(folder)!r} lacks {name!r}, which {DIGESTS} names")
        if file_digest(path) == digest:
            continue
        hint = "get it again, or take it as it is with --no-verify (verify=False)"
        if path.suffix == ".safetensors":
            try:
                found = tensor_digests(path)
            except (ValueError, KeyError, TypeError, OSError, OverflowError, AttributeError):
                found = {}  # the header is damaged
            for tensor, value in found.items():
                if tensor in tensors and tensors[tensor] != value:
                    raise CheckpointError(
                        f"tensor {tensor!r} in {name!r} is not what was written: damaged, or "
                        f"changed; {hint}"
                    )
        raise CheckpointError(
            f"{name!r} of {str(folder)!r} is not what was written: damaged, or changed; {hint}"
        )
