"""halfbyte.json: what an output was made of, and the SHA-256 of every file beside it and of itself.

All hashes and errors have a fixed length, so its size is known before a weight is read. The last line holds the hash of
the file itself, computed with zeros in the place of that hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.files import parse_object, read_small
from halfbyte.errors import CheckpointError, VerifyError
from halfbyte.kernels.tensor_error import TensorError
from halfbyte.plan.configuration import PROVENANCE

UNKNOWN = "0" * 64
"""Stands for a hash that is not known yet."""
VERSION = 3
"""Of the file; releases before wrote 1 and 2, without hashes."""
REQUIRED = frozenset({"halfbyte", "source", "dialect", "recipe", "plan", "files", "sha256"})
KEYS = REQUIRED | {"importance", "folds", "rounded_with_hessian", "calibrated_errors", "training"}


@dataclass(frozen=True)
class Outcome:
    """What is known only when everything is written.

    ``hashes`` by file name; ``source``: the digest of the source's samples; ``errors``: squared error and squares of
    weights, weighted by activations.
    """

    hashes: Mapping[str, str] = field(default_factory=dict)
    source: str = UNKNOWN
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def spell(
    origin: Mapping[str, Any], plan: str, sizes: Mapping[str, int], calibrated: Sequence[str], outcome: Outcome
) -> bytes:
    """Write the file, as long for any ``outcome``.

    ``origin``: what the output is made of; ``plan``: the plan's fingerprint; ``sizes`` by file name; ``calibrated``:
    names of the weights whose errors activations weigh.
    """
    files = {name: {"bytes": sizes[name], "sha256": outcome.hashes.get(name, UNKNOWN)} for name in sorted(sizes)}
    source = {**origin["source"], "sample": outcome.source}
    errors = {name: [_fixed(value) for value in outcome.errors.get(name, (0.0, 0.0))] for name in calibrated}
    weighted = {"calibrated_errors": errors} if errors else {}
    return seal({**origin, "source": source, "plan": plan, **weighted, "files": files})


def calibrated_errors(content: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return squared error and squares of each weight, weighted by activations, as a file states them; {} without."""
    errors = content.get("calibrated_errors")
    pairs: dict[str, tuple[float, float]] = {}
    for name, values in errors.items() if isinstance(errors, dict) else ():
        if not isinstance(values, list) or len(values) != 2 or not all(map(_is_number, values)):
            raise VerifyError(f"the error of {name[:100]} in halfbyte.json is no pair of numbers; the file is damaged")
        pairs[name] = float(values[0]), float(values[1])
    return pairs


def note_calibrated_errors(errors: Iterable[TensorError], record: Mapping[str, Any]) -> None:
    """Add to each weight's error what its conversion measured with the calibration's activations, if it did."""
    known = calibrated_errors(record)
    for error in errors:
        error.calibrated_error, error.calibrated_squares = known.get(error.name, (0.0, 0.0))


def _fixed(value: float) -> str:
    """A number of at least 0 in twelve characters."""
    return f"{min(value, 9e99) if value >= 1e-99 else 0.0:.6e}"


def _is_number(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"\d\.\d{6}e[+-]\d\d", text) is not None


def seal(content: Mapping[str, Any]) -> bytes:
    """The file with the hash of itself as the last entry."""
    open_text = _text({**content, "sha256": UNKNOWN})
    return _text({**content, "sha256": hashlib.sha256(open_text).hexdigest()})


def is_sealed(data: bytes) -> bool:
    """Whether the file is what was written, to the last bit."""
    try:
        content = json.loads(data)
        return isinstance(content, dict) and data == seal({k: v for k, v in content.items() if k != "sha256"})
    except (ValueError, RecursionError):
        return False


def check_keys(content: Mapping[str, Any], where: str) -> None:
    """VerifyError for keys that this release does not write, or that it never leaves out."""
    version = content.get("halfbyte")
    if version in (1, 2):
        unknown = set(content) - (KEYS - {"plan", "files", "sha256"})
        missing: set[str] = set()
    else:
        unknown, missing = set(content) - KEYS, set(REQUIRED - set(content))
    if type(version) is not int or not 1 <= version <= VERSION or unknown or missing:
        what = f"the unknown key {sorted(unknown)[0]!r}" if unknown else "a version that this release does not know"
        if missing and not unknown:
            what = f"no key {sorted(missing)[0]!r}"
        raise VerifyError(f"{where} has {what}, so it is damaged or of a newer release; convert again")


def read_provenance(folder: Path) -> dict[str, Any]:
    """halfbyte.json, {} where there is none; VerifyError for one that is damaged or has keys of its own."""
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    try:
        content = parse_object(read_small(path), PROVENANCE)
    except (CheckpointError, OSError) as error:
        raise VerifyError(f"{path} cannot be used ({error}); convert again") from error
    check_keys(content, str(path))
    return content


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
