"""Changing several files of a checkout together, so that every byte can be given back.

A checkout is the original files and a set of layers (`loss`, `compat`), and its content is a
function of the two. The folder `.rlo-stylegan` holds the originals and a ledger of which layers are
in force and which bytes that made. A change is written ahead: the ledger first says what is coming,
then the files are replaced one by one, each whole, then the ledger says it is done. Stopped
anywhere in between, and again in the change that goes on from there, each file is one of those that
the ledger knows: it forgets no content until a change has come to its end. One process at a time
changes a checkout (see `rlo_stylegan.layers.carry_out`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlo_core.files import atomic_path, write_json

from rlo_stylegan.checkout import RECORD
from rlo_stylegan.errors import ChangedError

_FORMAT = 1


def digest(content: bytes) -> str:
    """Return the SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


@dataclass
class Entry:
    """One file: digests of its original, of what was last written, and of what is being written.

    `earlier` are those that changes which were stopped may have left.
    """

    original: str
    now: str
    mode: int
    coming: str | None = None
    earlier: list[str] = field(default_factory=list)

    def known(self, found: str) -> bool:
        """Tell whether `found` is a content that this tool left."""
        return found in (self.now, self.coming, *self.earlier)

    def expect(self, coming: str) -> None:
        """Note what is being written, beside all that may be there until it is."""
        if self.coming is not None:
            self.earlier = sorted({*self.earlier, self.coming} - {coming})
        self.coming = coming

    def arrive(self) -> None:
        """Note that it is written: nothing else can be there now."""
        self.now, self.coming, self.earlier = self.coming or self.now, None, []


@dataclass
class Ledger:
    """The record of a checkout.

    Args:
        root: The checkout.
        layers: The layers in force.
        coming: The layers that an unfinished change is about to leave in force, None if there is
            none.
        files: The files that differ, or are about to differ, from their originals.
    """

    root: Path
    layers: tuple[str, ...] = ()
    coming: tuple[str, ...] | None = None
    files: dict[str, Entry] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the record is."""
        return self.root / RECORD

    @classmethod
    def load(cls, root: Path) -> Ledger:
        """Return the ledger of a checkout, empty where there is none.

        Raises:
            ChangedError: it cannot be read.
        """
        path = root / RECORD / "ledger.json"
        if not path.exists():
            return cls(root)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != _FORMAT:
                raise ChangedError(
                    f"{path} has format {document['format']}, this version knows {_FORMAT}"
                )
            coming = document["coming"]
            return cls(
                root,
                tuple(document["layers"]),
                None if coming is None else tuple(coming),
                {name: Entry(**entry) for name, entry in document["files"].items()},
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ChangedError(
                f"{path} cannot be read ({type(error).__name__}: {error}); the originals are "
                "beside it, in the folder originals"
            ) from error

    def _save(self) -> None:
        document: dict[str, Any] = {
            "format": _FORMAT,
            "layers": list(self.layers),
            "coming": None if self.coming is None else list(self.coming),
            "files": {name: vars(entry) for name, entry in sorted(self.files.items())},
        }
        write_json(self.folder / "ledger.json", document)

    def original(self, name: str) -> bytes:
        """Return a file as it was before any layer.

        Raises:
            ChangedError: the saved copy is gone or damaged.
        """
        if name not in self.files:
            return (self.root / name).read_bytes()
        saved = self.folder / "originals" / name
        content = saved.read_bytes() if saved.is_file() else b""
        if digest(content) != self.files[name].original:
            raise ChangedError(f"{saved} is not the original any more; restore {name} yourself")
        return content

    def changed(self) -> list[str]:
        """Return the files on record that are not what this tool left: edited, or gone."""
        return [name for name, entry in self.files.items() if not entry.known(self._found(name))]

    def pending(self) -> list[str]:
        """Return the files that an unfinished change has not reached."""
        return [
            name
            for name, entry in self.files.items()
            if entry.coming is not None and self._found(name) != entry.coming
        ]

    def _found(self, name: str) -> str:
        path = self.root / name
        return digest(path.read_bytes()) if path.is_file() else ""

    def check(self) -> None:
        """Raise ChangedError if a file on record is not what this tool left."""
        changed = self.changed()
        if changed:
            raise ChangedError(
                f"{', '.join(changed)} changed since the last apply; undo that change, or take the "
                f"original from {RECORD}/originals and remove {RECORD} to start over"
            )

    def change(self, layers: tuple[str, ...], contents: Mapping[str, bytes]) -> list[str]:
        """Bring the checkout to `layers`, whose files are `contents`; return the names written.

        Args:
            layers: The layers that are to be in force.
            contents: The full content of every file that these layers change. Files on record that
                are not in it go back to their originals.

        Raises:
            ChangedError: a file on record was edited, or an original is damaged.
        """
        self.check()
        wanted = {name: self.original(name) for name in self.files} | dict(contents)
        if not wanted:
            return []
        self._keep_originals([name for name in wanted if name not in self.files])
        for name, content in wanted.items():
            self.files[name].expect(digest(content))
        self.coming = layers
        self._save()
        written = []
        for name, content in wanted.items():
            if self._found(name) != self.files[name].coming:
                self._write(name, content)
                written.append(name)
            # Not in _write: a stop between replacing a file and this line must not lose its mode.
            (self.root / name).chmod(self.files[name].mode)
        for entry in self.files.values():
            entry.arrive()
        self.layers, self.coming = layers, None
        gone = [name for name, entry in self.files.items() if entry.now == entry.original]
        for name in gone:
            del self.files[name]
        if self.files:
            self._save()
            for name in gone:
                (self.folder / "originals" / name).unlink(missing_ok=True)
        else:
            self.close()
        return written

    def close(self) -> None:
        """Remove the record of a checkout that has no layer; nothing happens to one that has."""
        if not self.files:
            # The ledger goes first: with it the originals must be whole.
            (self.folder / "ledger.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _keep_originals(self, names: list[str]) -> None:
        for name in names:
            path = self.root / name
            content = path.read_bytes()
            with atomic_path(self.folder / "originals" / name) as temporary:
                temporary.write_bytes(content)
            same = digest(content)
            self.files[name] = Entry(same, same, stat.S_IMODE(path.stat().st_mode))
        with atomic_path(self.folder / ".gitignore") as temporary:
            temporary.write_bytes(b"*\n")

    def _write(self, name: str, content: bytes) -> None:
        path = (self.root / name).resolve()  # through a symbolic link, not over it
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
