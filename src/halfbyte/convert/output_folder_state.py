"""What an output folder holds before a conversion: nothing, the beginning of this very output, or all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import Journal, prepare_output
from halfbyte.checkpoint.files import parse_object, read_small
from halfbyte.checkpoint.identity import SourceIdentity
from halfbyte.checkpoint.journal import NAME, check_output
from halfbyte.checkpoint.lock import FOLDER, remove_leftovers, remove_remains
from halfbyte.checkpoint.store import LocalStore
from halfbyte.errors import CheckpointError, HalfbyteError, OutputError
from halfbyte.plan.conversion_plan import PROVENANCE, Plan


def source_identity(plan: Plan) -> SourceIdentity:
    """Who the files are that a conversion reads: the checkpoint's, and those of the statistics of a calibration.

    CheckpointError if one of them changed since the plan was made.
    """
    inventory = plan.checkpoint.inventory
    source = SourceIdentity(inventory.store, inventory.identities)
    statistics = plan.calibration_use.calibration.statistics if plan.calibration_use else None
    if statistics is not None:
        source.add(SourceIdentity(LocalStore(statistics.folder), statistics.identities), "calibration/")
    return source


def already_complete(plan: Plan, out: Path, source: SourceIdentity) -> bool:
    """Whether the folder holds the finished output of this plan and this source, every file with its size.

    OutputError, before anything is made there, for a folder that cannot be used; also for this output with a file
    missing.
    """
    record = _provenance(out) if not (out / FOLDER / NAME).exists() else {}
    if record.get("plan") != plan.fingerprint:
        check_output(out, plan.checkpoint.inventory.root)
        return False
    if record.get("source", {}).get("sample") != source.digest(plan.checkpoint.inventory.files):
        raise OutputError(
            f"{out} holds the output of this plan from another state of the source; choose another folder or remove "
            "this one"
        )
    for name, size in plan.file_bytes.items():
        if name not in plan.side_files and (not (out / name).is_file() or (out / name).stat().st_size != size):
            raise OutputError(f"{out} was complete, but {name} is damaged or missing now; remove {out} to start anew")
    if (out / FOLDER).exists():
        remove_remains(out)
    return True


def continue_or_begin(plan: Plan, out: Path, source: SourceIdentity, announce: Callable[[str], None]) -> Journal:
    """The journal of the folder, new or of an interrupted run; only under the folder's lock.

    OutputError if the source is not what the interrupted run read. Finished files that hold something else by now
    are forgotten, and what killed runs left of unfinished ones is removed.
    """
    journal = prepare_output(
        out, plan.checkpoint.inventory.root, plan.fingerprint, source.to_dict(), plan.origin["recipe"]
    )
    changed = source.changed(journal.source)
    if changed is not None:
        raise OutputError(
            f"{changed} of the source is not what it was when the conversion in {out} began, so continuing would mix "
            f"two models; remove {out} to start anew, or choose another folder"
        )
    remove_leftovers(out, [*plan.file_bytes, PROVENANCE])
    if journal.continued:
        journal.check_files()
        finished = sum(shard.name in journal.done for shard in plan.shards)
        announce(f"continuing in {out}: {finished} of {len(plan.shards)} weight files are finished")
    return journal


def discard(plan: Plan, out: Path) -> None:
    """Remove what this conversion wrote and no rerun can use, and the folder if that was all of it."""
    for name in (PROVENANCE, *plan.file_bytes):
        for path in (out / name, out / f"{name}.partial"):
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):
        (out / FOLDER / NAME).unlink()


def with_what_stays(plan: Plan, out: Path, journal: Journal, error: HalfbyteError) -> HalfbyteError:
    """The same error, saying what is finished already; where nothing is, nothing is left either."""
    if not journal.done:
        discard(plan, out)
        return error
    finished = sum(shard.name in journal.done for shard in plan.shards)
    return type(error)(
        f"{error}; {finished} of {len(plan.shards)} weight files in {out} are finished, and the same command "
        "continues there"
    )


def _provenance(out: Path) -> dict[str, Any]:
    try:
        content = parse_object(read_small(out / PROVENANCE), PROVENANCE)
    except CheckpointError:
        return {}
    return content if isinstance(content.get("source"), dict) else {}
