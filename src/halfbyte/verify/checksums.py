"""The SHA-256 of every file of an output against what halfbyte.json says, without the source."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from halfbyte.checkpoint import write_file_atomic
from halfbyte.checkpoint.files import read_small, reason
from halfbyte.checkpoint.stream_hash import hash_path
from halfbyte.plan import sealed_provenance
from halfbyte.plan.conversion_plan import CONFIG, PROVENANCE
from halfbyte.plan.resources import cores

_HASH = re.compile(r"[0-9a-f]{64}")
# what engines may load in place of the weights
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx")


@dataclass
class Checksums:
    """``stated``: whether halfbyte.json holds hashes; ``files``: how many were compared; ``others``: names of files
    that the conversion did not write."""

    stated: bool = False
    files: int = 0
    bytes: int = 0
    others: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_files(folder: Path, record: dict[str, Any], report: Callable[[int], None]) -> Checksums:
    """Read every file of an output and compare it with the hash that ``record``, its halfbyte.json, states."""
    result = Checksums(stated="files" in record)
    if not result.stated:
        return result
    if not sealed_provenance.is_sealed(read_small(folder / PROVENANCE)):
        result.problems.append(f"{PROVENANCE} is not what was written: its own SHA-256 differs")
    stated = _stated(record["files"], result.problems)
    with ThreadPoolExecutor(min(4, cores())) as pool:
        outcomes = pool.map(lambda name: _compare(folder, name, *stated[name], report), stated)
        result.problems += [problem for problem in outcomes if problem]
    result.files, result.bytes = len(stated) + 1, sum(size for size, _ in stated.values())
    for name in _present(folder):
        if name in stated or name == PROVENANCE:
            continue
        if name.endswith(_WEIGHTS) or name == CONFIG:
            result.problems.append(f"{name} is no file of this output; an engine may load it instead")
        else:
            result.others.append(name)
    return result


def stated_bytes(folder: Path) -> int:
    """Bytes of all files whose hash halfbyte.json states: the total for a progress bar."""
    record = sealed_provenance.read_provenance(folder)
    return sum(size for size, _ in _stated(record["files"], []).values()) if "files" in record else 0


def update_checksum(folder: Path, name: str) -> bool:
    """Note the SHA-256 of a file that was replaced on purpose, as a model card is; False where none are noted."""
    record = sealed_provenance.read_provenance(folder)
    if "files" not in record or not sealed_provenance.is_sealed(read_small(folder / PROVENANCE)):
        return False
    path = folder / name
    record["files"][name] = {"bytes": path.stat().st_size, "sha256": hash_path(path)}
    record["files"] = dict(sorted(record["files"].items()))
    write_file_atomic(folder / PROVENANCE, sealed_provenance.seal({k: v for k, v in record.items() if k != "sha256"}))
    return True


def _stated(files: Any, problems: list[str]) -> dict[str, tuple[int, str]]:
    stated: dict[str, tuple[int, str]] = {}
    for name, entry in files.items() if isinstance(files, dict) else ():
        size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        pure = PurePosixPath(name)
        plain = name == str(pure) and not pure.is_absolute() and ".." not in pure.parts and "\0" not in name
        if plain and type(size) is int and isinstance(sha256, str) and _HASH.fullmatch(sha256) and len(entry) == 2:
            stated[name] = size, sha256
        else:
            problems.append(f"{PROVENANCE} states no size and SHA-256 of {name!r}")
    if not stated:
        problems.append(f"{PROVENANCE} states the SHA-256 of no file")
    return stated


def _compare(folder: Path, name: str, size: int, sha256: str, report: Callable[[int], None]) -> str | None:
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        actual = path.stat().st_size
        if actual != size:
            return f"{name} has {actual} bytes, but {size} were written"
        if hash_path(path) != sha256:
            return f"{name} is not what was written: its SHA-256 differs"
    except OSError as error:
        return f"{name} cannot be read ({reason(error)})"
    finally:
        report(size)
    return None


def _present(folder: Path) -> Iterator[str]:
    """Visible files of the folder and its sub-folders."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not any(part.startswith(".") for part in parts) and path.is_file():
            yield "/".join(parts)
