"""Files against checksums and source: the whole verification."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import Inventory, Reader
from halfbyte.checkpoint.identity import SourceIdentity
from halfbyte.dialects import quantization_config_of
from halfbyte.errors import CheckpointError, HalfbyteError, VerifyError
from halfbyte.kernels.tensor_error import MAX_OBJECTIVE, MAX_RELMSE, TensorError
from halfbyte.plan.sealed_provenance import note_calibrated_errors, read_provenance
from halfbyte.plan.smoothing_use import stored_smoothings
from halfbyte.recipes import Decision
from halfbyte.recipes.resolve import refits
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.smoothing import SMOOTHING_FILE, Smoothing
from halfbyte.stores.open_source import open_inventory
from halfbyte.verify.checkpoint_pair import CheckpointPair
from halfbyte.verify.checksums import check_files
from halfbyte.verify.config_keys import misspelt_keys
from halfbyte.verify.output_folder import decisions_of, files_beside, unfinished
from halfbyte.verify.recorded_recipe import differences, recorded_plan
from halfbyte.verify.verification import Verification

__all__ = ["MAX_RELMSE", "Verification", "verify"]


def verify(
    out: str | Path,
    against: str | Path | None = None,
    revision: str | None = None,
    max_relmse: float = MAX_RELMSE,
    progress: Callable[[int], None] | None = None,
    cache: bool = False,
    inventory: Inventory | None = None,
) -> Verification:
    """Check every file of an output against its checksums and, with ``against``, all of it against its source.

    Reads both completely; ``cache``: a source on the hub is downloaded to its cache first; ``inventory``: that of
    ``against``, where its headers were read already. Problems are collected, not raised; CheckpointError or VerifyError
    only where a folder cannot be read at all, or where there is neither a source nor a checksum.
    """
    folder = Path(out)
    if not folder.exists():
        raise CheckpointError(f"there is no folder {folder}; name the output of a conversion")
    unfinished(folder)
    report = progress or (lambda _: None)
    result = Verification(str(out), None if against is None else str(against))
    record = read_provenance(folder)
    result.checksums = check_files(folder, record, report)
    result.problems += result.checksums.problems
    if against is None and not result.checksums.stated:
        raise VerifyError(
            f"{folder} holds no checksums, since another tool or an older halfbyte wrote it; name its source with "
            "--against SRC"
        )
    if against is None:
        return result
    source = Checkpoint(inventory or open_inventory(against, revision, cache))
    try:
        _against(result, folder, record, source, max_relmse, report)
    except HalfbyteError as error:
        if not result.problems:
            raise
        result.problems.append(str(error))  # no wonder in a damaged output
    return result


def _against(
    result: Verification,
    folder: Path,
    record: dict[str, Any],
    source: Checkpoint,
    max_relmse: float,
    report: Callable[[int], None],
) -> None:
    """Compare an output with its source."""
    ours = Checkpoint(Inventory.open(folder))
    result.problems += files_beside(folder, ours, source)
    if ours.dialect is None:
        result.problems.append("config.json has no quantization_config, so engines would misread the packed tensors")
        return
    settings = quantization_config_of(ours.inventory)
    if settings.get("quant_method") not in (None, "halfbyte"):
        result.problems += misspelt_keys(settings, "the quantization_config of config.json")
    decisions = decisions_of(folder, record, source)
    with Reader(ours.inventory) as left, Reader(source.inventory) as right:
        smoothings = _smoothings(folder, record, source, right, result.problems)
        result.smoothed = len(smoothings)
        training = record.get("training")
        moved = training if isinstance(training, dict) else {}
        pair = CheckpointPair(result, ours, source, left, right, max_relmse, smoothings, moved)
        pair.check_all(decisions, record, report)
        note_calibrated_errors(result.errors, record)
        result.problems += beyond_objective(result.errors, decisions)
        plan = None if result.checksums.stated or result.problems else recorded_plan(record, source)
        if plan is not None:
            result.recomputed = True
            result.problems += differences(plan, folder, ours, left, right)
    if result.problems:
        result.wrong_source = _wrong_source(record, source, result)


def beyond_objective(errors: Iterable[TensorError], decisions: Mapping[str, Decision]) -> Iterator[str]:
    """Weights that were refitted, and whose noted error of outputs is beyond its bound: their own error says little."""
    for error in errors:
        decision, objective = decisions.get(error.name), error.calibrated_relmse
        if decision is None or not refits(decision.method) or objective is None:
            continue
        if not objective <= MAX_OBJECTIVE:
            yield (
                f"{error.name} has outputs with a relative error of {objective:.3g} against those that it was "
                f"refitted to (at most {MAX_OBJECTIVE:g} is allowed)"
            )


def _wrong_source(record: dict[str, Any], source: Checkpoint, result: Verification) -> str:
    """What to say first if an output with problems was made from another source."""
    origin = record.get("source")
    inventory = source.inventory
    if not isinstance(origin, dict) or not {"name", "fingerprint"} <= set(origin):
        return ""
    same = origin["fingerprint"] == inventory.fingerprint
    if same and "sample" in origin:
        same = origin["sample"] == SourceIdentity(inventory.store, inventory.identities).digest(inventory.files)
    at = f" at revision {origin['revision']}" if origin.get("revision") else ""
    where = "another source" if origin["name"] == inventory.source.rstrip("/").rsplit("/", 1)[-1] else origin["name"]
    return "" if same else f"{result.source} is not what {result.out} was made from, which was {where}{at}"


def _smoothings(
    folder: Path, record: dict[str, Any], source: Checkpoint, reader: Reader, problems: list[str]
) -> dict[str, Smoothing]:
    """What smoothing made of each weight."""
    if record.get("folds") and not (folder / SMOOTHING_FILE).is_file():
        problems.append(f"{SMOOTHING_FILE} is missing, so what was smoothed in the weights cannot be checked")
    try:
        return stored_smoothings(folder, source, reader) if record.get("folds") else {}
    except CheckpointError as error:
        problems.append(str(error))
        return {}
