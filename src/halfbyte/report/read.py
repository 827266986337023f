"""Results files: found, told apart, checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from halfbyte.checkpoint.files import read_small
from halfbyte.errors import CheckpointError, HalfbyteError, OutputError
from halfbyte.evaluate.sensitivity_file import read_sensitivity
from halfbyte.report.results_schema import Allocation, Document, ErrorsFile, Results, Sensitivity

KINDS: dict[str, type[Document]] = {"results": Results, "errors": ErrorsFile, "sensitivity": Sensitivity}
SUFFIXES = (".json", ".jsonl")
MAX_DOCUMENT_BYTES = 1 << 30
"""Results of a hundred checkpoints with the errors of every expert have about 100 MB."""


class ReportError(HalfbyteError):
    """A results file is missing, unreadable, or not what it should be."""


@dataclass
class Inputs:
    """Documents by file, in the order they were given; ``ignored``: JSON files of a folder that are something else."""

    results: list[Results] = field(default_factory=list)
    errors: list[ErrorsFile] = field(default_factory=list)
    sensitivity: list[Sensitivity] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)


def read_inputs(paths: Sequence[str | Path]) -> Inputs:
    """Read files, and of folders all .json and .jsonl files directly in them that are documents of halfbyte.

    ReportError where a file that was named is none, a document is damaged, or nothing is found at all.
    """
    inputs = Inputs()
    seen: set[Path] = set()
    for path in map(Path, paths):
        if not path.exists():
            raise ReportError(f"{path} does not exist; give results files of `halfbyte evaluate`, or their folder")
        members = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else [path]
        for file in members:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            document = read_document(file)
            if document is not None:
                _keep(inputs, document)
                inputs.files.append(file)
            elif path.is_dir():
                inputs.ignored.append(file)
            else:
                raise ReportError(f"{file} is no results, errors, sensitivity or allocation file of halfbyte")
    if not inputs.files:
        where = ", ".join(str(path) for path in paths)
        raise ReportError(f"no results file in {where}; write one with `halfbyte evaluate ... -o results.json`")
    return inputs


def read_results(path: str | Path) -> Results:
    """A results file, or ReportError."""
    document = read_document(Path(path))
    if not isinstance(document, Results):
        raise ReportError(f"{path} is no results file of `halfbyte evaluate -o`")
    return document


def read_document(path: Path) -> Document | None:
    """A document of halfbyte; None where the JSON is something else; ReportError where it is damaged."""
    if not path.exists():
        raise ReportError(f"{path} does not exist")
    try:
        text = read_small(path, MAX_DOCUMENT_BYTES).decode()
        value = _lines(path, text) if path.suffix == ".jsonl" else json.loads(text)
    except CheckpointError as error:
        raise ReportError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        return None
    kind = KINDS.get(value["halfbyte"]) if isinstance(value.get("halfbyte"), str) else None
    if kind is None and {"frontier", "predicted_loss"} <= value.keys():
        kind = Allocation
    if kind is None:
        return None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise ReportError(f"{path}: {place}: {first['msg']}; was it written by another version?") from error


def _lines(path: Path, text: str) -> Any:
    """JSON lines of `halfbyte sensitivity` as one object; None where they are something else."""
    first = json.loads(text.split("\n", 1)[0] or "null")
    if not isinstance(first, dict) or first.get("halfbyte") != "sensitivity":
        return first if isinstance(first, dict) else None
    try:
        return read_sensitivity(path)
    except OutputError as error:
        raise ReportError(str(error)) from error


def _keep(inputs: Inputs, document: Document) -> None:
    if isinstance(document, Results):
        inputs.results.append(document)
    elif isinstance(document, ErrorsFile):
        inputs.errors.append(document)
    elif isinstance(document, Sensitivity):
        inputs.sensitivity.append(document)
    else:
        inputs.allocations.append(document)
