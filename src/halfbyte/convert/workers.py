"""A conversion by several processes, each of which writes some of the files, in one folder that all of them see."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.identity import SourceIdentity
from halfbyte.checkpoint.journal import check_output
from halfbyte.checkpoint.lock import FOLDER, OutputLock
from halfbyte.checkpoint.shared_journal import RUN, SharedJournal
from halfbyte.convert.conversion import Conversion, Progress, complete_output, write_files
from halfbyte.convert.output_folder_state import already_complete, source_identity
from halfbyte.convert.refusals import Refusals
from halfbyte.errors import OutputBusyError, OutputError, PlanError
from halfbyte.kernels.tensor_error import TensorError
from halfbyte.plan.conversion_plan import PROVENANCE, Plan
from halfbyte.plan.resources import MEMORY, Limits, cores

SHOWN = 4


def files_of(plan: Plan, worker: int, workers: int) -> list[str]:
    """The weight files that worker number ``worker`` (from 0) of ``workers`` writes: every ``workers``-th one."""
    if not 0 <= worker < workers:
        raise PlanError(f"there is no worker {worker} of {workers}; they are counted from 0 to {workers - 1}")
    return [shard.name for shard in plan.shards[worker::workers]]


def convert_files(
    plan: Plan,
    out: str | Path,
    files: Iterable[str],
    threads: int | None = None,
    progress: Progress | None = None,
    memory: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    source: SourceIdentity | None = None,
) -> Conversion:
    """Write some weight files of a plan to ``out``; other processes may write others, or the same ones, meanwhile.

    Files that are finished already are left alone. The output is complete after ``finish``. ``arguments``: the command,
    noted for ``halfbyte finish``; ``source``: ``source_identity(plan)`` where that is known already, here as below.
    OutputError where the other processes have another plan, source or release;
    everything else is raised as by ``convert``, and what is finished stays.
    """
    began = time.monotonic()
    out, names = Path(out).expanduser(), set(files)
    unknown = names - {shard.name for shard in plan.shards}
    if unknown:
        raise PlanError(f"the plan has no weight file {min(unknown)}; it has {len(plan.shards)} of them")
    source = source or source_identity(plan)
    if _is_complete(plan, out, source):
        return Conversion(out, [], time.monotonic() - began, len(names), already_complete=True)
    journal = SharedJournal(out, plan.fingerprint, source.to_dict(), plan.origin["recipe"], arguments)
    todo = [shard for shard in plan.shards if shard.name in names and shard.name not in journal.done]
    limits = Limits(threads or cores(), memory or MEMORY)
    chosen = write_files(plan, out, journal, source, todo, limits, progress or (lambda _: None), Refusals())
    errors = [TensorError(**e) for shard in todo for e in journal.done[shard.name]["errors"]]
    return Conversion(out, errors, time.monotonic() - began, len(names) - len(todo), chosen)


def missing_files(plan: Plan, out: str | Path, source: SourceIdentity | None = None) -> list[str]:
    """Weight files of a plan that no process has finished yet; [] for a complete output."""
    out = Path(out).expanduser()
    source = source or source_identity(plan)
    if _is_complete(plan, out, source):
        return []
    journal = SharedJournal(out, plan.fingerprint, source.to_dict(), plan.origin["recipe"])
    return [shard.name for shard in plan.shards if shard.name not in journal.done]


def finish(plan: Plan, out: str | Path, source: SourceIdentity | None = None) -> Conversion:
    """Complete an output whose weight files are all written: side files, index, halfbyte.json, then config.json.

    OutputError that names what is missing, and OutputBusyError while another process does the same.
    """
    began = time.monotonic()
    out = Path(out).expanduser()
    source = source or source_identity(plan)
    if _is_complete(plan, out, source):
        return Conversion(out, [], 0.0, len(plan.shards), already_complete=True)
    with OutputLock(out):
        if _is_complete(plan, out, source):  # by another process, while this one came to its turn
            return Conversion(out, [], 0.0, len(plan.shards), already_complete=True)
        journal = SharedJournal(out, plan.fingerprint, source.to_dict(), plan.origin["recipe"])
        missing = [shard.name for shard in plan.shards if shard.name not in journal.done]
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise OutputError(
                f"{len(missing)} of {len(plan.shards)} weight files of {out} are not finished: "
                f"{', '.join(missing[:SHOWN])}{more}; run their shards again, then finish"
            )
        errors = complete_output(plan, out, journal, source)
        for name in (PROVENANCE, *plan.file_bytes):  # of workers that were killed
            for partial in out.glob(f"{name}.*.partial"):
                with suppress(OSError):
                    partial.unlink()
        journal.finish()
    return Conversion(out, errors, time.monotonic() - began, len(plan.shards))


def finish_if_last(plan: Plan, out: str | Path, source: SourceIdentity | None = None) -> bool:
    """Complete the output where all of its weight files are finished; whether it is complete now, or soon."""
    source = source or source_identity(plan)
    if missing_files(plan, out, source):
        return False
    with suppress(OutputBusyError):  # another worker does it at this moment
        finish(plan, out, source)
    return True


def _is_complete(plan: Plan, out: Path, source: SourceIdentity) -> bool:
    """Whether the output is complete; OutputError for a folder that workers cannot use."""
    if (out / FOLDER / RUN).exists():
        return False
    if (out / PROVENANCE).exists():
        return already_complete(plan, out, source)
    check_output(out, plan.checkpoint.inventory.root, RUN)
    return False
