"""Which output files are finished, so that a conversion can continue; and which folders may be used."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.files import reason
from halfbyte.checkpoint.lock import FOLDER, LOCK
from halfbyte.checkpoint.stream_hash import hash_path
from halfbyte.checkpoint.writer import partial_name, sync_folder
from halfbyte.errors import OutputError

NAME = "journal.jsonl"
DONE = "done"
"""Folder of a journal that several processes write."""
VERSION = 2
_LONGEST_LINE = 1 << 26


class Journal:
    """Finished files of one conversion, in ``<folder>/.halfbyte/journal.jsonl``; opened or created.

    The first line holds the conversion's fingerprint, its ``recipe``, and ``source``, who the files are that it reads;
    a journal of another conversion is an OutputError. ``done`` maps a file name to {"nbytes": n, **extra}, only for
    files that are there with that size. ``continued``: whether an earlier run began it.
    """

    attempt = ""
    """Makes temporary names unique; needed only where several processes write."""

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str,
        source: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.path = self.folder / FOLDER / NAME
        self.source: dict[str, Any] = dict(source or {})
        self._recipe = dict(recipe or {})
        self.done: dict[str, dict[str, Any]] = {}
        self.continued = self.path.exists()
        if not self.continued:
            self._start()
        self.refresh()

    def refresh(self) -> None:
        """Read the journal again, for what other processes have finished meanwhile."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise OutputError(f"the journal {self.path} cannot be read ({reason(error)})") from error
        first = _object(lines[0])
        if first is not None and first.get("journal") != VERSION:
            raise OutputError(
                f"{self.folder} holds the unfinished output of another release of halfbyte; remove it to start anew"
            )
        if first is None or first.get("fingerprint") != self.fingerprint:
            raise OutputError(
                f"{self.folder} holds the unfinished output of another conversion; choose another folder"
                " or remove this one"
            )
        source = first.get("source")
        self.source = source if isinstance(source, dict) else {}
        self.done = {}
        for line in lines[1:]:
            record = _object(line)  # None for a line that was torn when its process was killed
            if record is None:
                continue
            name, size, extra = record.get("file"), record.get("nbytes"), record.get("extra")
            if isinstance(name, str) and type(size) is int and isinstance(extra, dict):
                if self._size(name) == size:
                    self.done[name] = {"nbytes": size, **extra}
                else:
                    self.done.pop(name, None)

    def record(self, filename: str, nbytes: int, extra: dict[str, Any] | None = None) -> None:
        """Note that a file is complete under its final name; durable when this returns."""
        extra = extra or {}
        line = json.dumps({"file": filename, "nbytes": nbytes, "extra": extra}).encode() + b"\n"
        try:
            # No O_CREAT: if the journal is gone, the folder is no longer ours.
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line  # a torn line must not swallow this one
                view = memoryview(line)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OutputError(f"the journal {self.path} cannot be written ({reason(error)})") from error
        self.done[filename] = {"nbytes": nbytes, **extra}

    def check_files(self, report: Callable[[int], None] | None = None) -> None:
        """Read every finished file whose ``sha256`` is noted, and forget those that hold something else now."""
        for name, entry in list(self.done.items()):
            try:
                right = "sha256" not in entry or hash_path(self.folder / name) == entry["sha256"]
            except OSError:
                right = False
            if not right:
                del self.done[name]
            elif report is not None:
                report(entry["nbytes"])

    def finish(self) -> None:
        """The conversion is complete: remove the journal and its folder."""
        try:
            self.path.unlink()
            shutil.rmtree(self.path.parent)
            sync_folder(self.folder)
        except OSError as error:
            raise OutputError(f"the journal folder {self.path.parent} cannot be removed ({reason(error)})") from error

    def _start(self) -> None:
        """Write the first line; where several processes start at once, the first one wins and none fails."""
        first = {"journal": VERSION, "fingerprint": self.fingerprint, "source": self.source, "recipe": self._recipe}
        create_once(self.path, json.dumps(first) + "\n")

    def _size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except (OSError, ValueError):
            return None


def create_once(path: Path, text: str) -> None:
    """Write a small file as a whole, unless it is there; where several processes do, the first wins and none fails."""
    temporary = path.with_name(partial_name(path.name, uuid.uuid4().hex))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, never replaces a file
        except FileExistsError:
            pass
        except OSError:  # no hard links on this file system
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({reason(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of an unfinished conversion; {} where there is none or it does not say."""
    try:
        with open(folder / FOLDER / NAME, "rb") as file:
            first = _object(file.readline(_LONGEST_LINE)) or {}
    except OSError:
        return {}
    recipe = first.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def prepare_output(
    out: str | Path,
    source_root: str | Path | None,
    fingerprint: str,
    source: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Journal:
    """Make the output folder, or continue in one whose journal has this fingerprint; the rest as in ``Journal``.

    OutputError for a file, a folder that holds anything else, or a folder that is the input or inside it.
    """
    check_output(out, source_root)
    return Journal(Path(out).expanduser(), fingerprint, source, recipe)


def check_output(out: str | Path, source_root: str | Path | None, journal: str = NAME) -> None:
    """Make the output folder; OutputError where ``prepare_output`` raises it for the folder itself.

    ``journal``: the file in the inner folder that marks an output as one that may be continued.
    """
    out = Path(out).expanduser()
    try:
        resolved = out.resolve()
        if resolved.exists() and not resolved.is_dir():
            raise OutputError(f"the output {out} is a file; choose a folder")
        if source_root is not None:
            _refuse_inside(out, resolved, Path(source_root).expanduser().resolve())
        resolved.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in resolved.iterdir()]
        inner = resolved / FOLDER
        # Killed before its first line, a run leaves an empty journal folder behind.
        fresh = not names or (
            names == [FOLDER] and all(p.name in (LOCK, DONE) or p.name.endswith(".partial") for p in inner.iterdir())
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise OutputError(f"the output folder {out} cannot be used ({reason(error)})") from error
    if not fresh and not (inner / journal).is_file():
        raise OutputError(f"the output folder {out} is not empty; choose another folder or empty it")


def _refuse_inside(out: Path, resolved: Path, source: Path) -> None:
    for folder in (resolved, *resolved.parents):
        if folder == source or (folder.exists() and source.exists() and os.path.samefile(folder, source)):
            place = "the input folder itself" if folder is resolved else f"inside the input folder {source}"
            raise OutputError(f"the output {out} is {place}; choose a folder elsewhere")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
