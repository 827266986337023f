"""The journal of a conversion by several processes: one small file per finished output file, each made only once."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte import __version__
from halfbyte.checkpoint.files import parse_object, read_small
from halfbyte.checkpoint.journal import DONE, Journal, create_once
from halfbyte.checkpoint.lock import FOLDER
from halfbyte.errors import CheckpointError, OutputError

RUN = "run.json"
"""What all processes must agree on: the plan, the release, the source, and the command."""


class SharedJournal(Journal):
    """Finished files of a conversion by several processes, in ``<folder>/.halfbyte/done``; opened or created.

    The first process writes ``run.json``; OutputError in a process with another plan, release or source. Records are
    whole files that appear under their names at once, so that file systems without shared appends will do.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str,
        source: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.attempt = uuid.uuid4().hex[:8]
        self.path = self.folder / FOLDER / RUN
        self.source = dict(source or {})
        self.done = {}
        self.continued = self.path.exists()
        run = {
            "halfbyte": __version__,
            "fingerprint": fingerprint,
            "source": self.source,
            "recipe": dict(recipe or {}),
            "arguments": dict(arguments or {}),
        }
        create_once(self.path, json.dumps(run))
        self._compare(read_run(self.folder))
        self.refresh()

    def refresh(self) -> None:
        """Read the records again, for what other processes have finished meanwhile."""
        self.done = {}
        records = self.path.parent / DONE
        for path in sorted(records.glob("*.json")) if records.is_dir() else ():
            record = parse_object(read_small(path), path.name)
            name, size, extra = record["file"], record["nbytes"], record["extra"]
            if self._size(name) == size:
                self.done[name] = {"nbytes": size, **extra}

    def record(self, filename: str, nbytes: int, extra: dict[str, Any] | None = None) -> None:
        """Note that a file is complete under its final name; the first process that says so is heard."""
        extra = extra or {}
        self.done[filename] = {"nbytes": nbytes, **extra}
        if not self.path.exists():  # all files were finished by others, who have completed the output
            return
        entry = {"file": filename, "nbytes": nbytes, "extra": extra}
        create_once(self.path.parent / DONE / f"{filename}.json", json.dumps(entry))

    def _compare(self, run: Mapping[str, Any]) -> None:
        if run.get("halfbyte") != __version__:
            raise OutputError(
                f"{self.folder} is being written by halfbyte {run.get('halfbyte')}, and this is {__version__}; all "
                "workers need the same release"
            )
        if run.get("fingerprint") != self.fingerprint:
            raise OutputError(
                f"{self.folder} is being written by another recipe or from another source; choose another folder or "
                "remove this one"
            )
        before = run.get("source") or {}
        for name in sorted({*before, *self.source}):
            ours, theirs = self.source.get(name, {}), before.get(name, {})
            if (ours.get("bytes"), ours.get("sample")) != (theirs.get("bytes"), theirs.get("sample")):
                raise OutputError(
                    f"{name} of the source is not what the other workers of {self.folder} read, so the output would "
                    "mix two models; give all workers the same files"
                )


def read_run(folder: Path) -> dict[str, Any]:
    """What the workers of an unfinished output agree on; OutputError where no workers write there."""
    path = folder / FOLDER / RUN
    if not path.is_file():
        raise OutputError(f"{folder} holds no output that workers have begun; run `halfbyte quantize ... --shard i/N`")
    try:
        return parse_object(read_small(path), str(path))
    except CheckpointError as error:
        raise OutputError(f"{path} is damaged ({error}); remove {folder} to start anew") from error
