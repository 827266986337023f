"""Which files of a checkpoint folder are weights, which travel along unchanged, and which are left out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from halfbyte.checkpoint.adapter import check_no_adapter
from halfbyte.checkpoint.config import CONFIG
from halfbyte.checkpoint.files import check_unicode, parse_object, printable
from halfbyte.checkpoint.foreign import check_plain
from halfbyte.checkpoint.listing import OTHER_WEIGHTS
from halfbyte.checkpoint.store import Store
from halfbyte.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

#: Endings of the files that travel with a checkpoint; others are named, not copied.
SIDE_FILES = (
    *(".json", ".jsonl", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe", ".spm", ".py", ".yaml", ".yml"),
    *(".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"),
)
_DOCUMENTS = ("license", "licence", "notice", "readme", "copying", "use_policy")
_PLAIN_BYTES = 1_000_000

_SHARD = re.compile(r"(?P<stem>.+?)-(?P<number>\d+)(?:-of-(?P<count>\d+))?\.safetensors")


@dataclass
class Contents:
    """Sorted names relative to the folder.

    weights: the safetensors files to read; index: tensor -> file, None without an index file; index_metadata:
    what the index says besides; side_files: name -> bytes; ignored: weights that are not read.
    """

    weights: list[str]
    index: dict[str, str] | None = None
    index_metadata: dict[str, Any] = field(default_factory=dict)
    side_files: dict[str, int] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def scan(store: Store, only: str | None = None) -> Contents:
    """Sort the files of a store; with ``only``, that one safetensors file is the checkpoint."""
    names = store.list()
    top = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n)
    index_name = None if only else find_index(names)
    if only:
        contents = Contents([only])
    elif index_name:
        index, metadata = read_index(store.read_small(index_name), index_name)
        contents = Contents(sorted(set(index.values())), index, metadata)
    else:
        check_no_adapter(store, [], names if not top else ())
        contents = Contents(_without_index(store, top, names))
    check_no_adapter(store, contents.weights, names)
    for name, size in sorted(names.items()):
        read = name in contents.weights or name in (index_name, CONFIG)
        if not read and (size is None or not belongs(name, size)):
            contents.ignored.append(printable(name))
        elif printable(name) != name:
            raise CheckpointError(
                f"the file name {printable(name)} in {store.place} is not UTF-8; rename or remove the file"
            )
        elif not read and size is not None:
            contents.side_files[name] = size
    if only and CONFIG not in names:
        contents.side_files = {}  # a lone file in a folder of other things: they do not belong to it
    return contents


OTHERS_SETTINGS = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""Where GPTQ, AWQ and others say how they quantized; beside weights of another format, engines believe them."""


def belongs(name: str, size: int) -> bool:
    """Tell whether a file that holds no weights belongs to a checkpoint: configuration, tokenizer, code, documents."""
    base = name.rpartition("/")[2].lower()
    if base in OTHERS_SETTINGS:
        return False
    if base.endswith((".safetensors", ".safetensors.index.json", *OTHER_WEIGHTS)):
        return False
    # licences and notices often have no ending
    return base.endswith(SIDE_FILES) or base.startswith(_DOCUMENTS) or ("." not in base and size <= _PLAIN_BYTES)


def find_index(names: Iterable[str]) -> str | None:
    """The index file among the names: the usual one, else the only one that there is."""
    indexes = sorted(n for n in names if n.endswith(".safetensors.index.json") and "/" not in n)
    if INDEX in indexes:
        return INDEX
    return indexes[0] if len(indexes) == 1 else None


def is_plain_path(name: str) -> bool:
    """Whether a file that another file names stays inside its folder, on every system."""
    pure = PurePosixPath(name)
    return not (
        name in ("", ".")
        or name != str(pure)
        or pure.is_absolute()
        or ".." in pure.parts
        or set(name) & {"\\", ":", "\0"}
        or is_too_long(name)
    )


def read_index(content: bytes, file: str) -> tuple[dict[str, str], dict[str, Any]]:
    """(tensor -> shard, metadata) of an index file named ``file``, with shard names that stay inside the folder."""
    table = parse_object(content, file)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file} has no weight_map from tensors to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{file} maps tensor {name} to something that is no file name")
    shards = set(weight_map.values())
    check_unicode([*weight_map, *shards], file)
    for shard in shards:
        if not is_plain_path(shard):
            raise CheckpointError(f"{file} names the file {shard[:200]!r}, which is no plain path inside its folder")
    metadata = table.get("metadata")
    if not isinstance(metadata, dict):
        return weight_map, {}
    check_plain(metadata, f"metadata of {file}")
    return weight_map, metadata


def is_too_long(file: str) -> bool:
    """Whether no file system can have a file of this name."""
    return any(len(part.encode(errors="surrogatepass")) > 255 for part in file.split("/")) or len(file) > 1024


def _without_index(store: Store, top: list[str], names: dict[str, int | None]) -> list[str]:
    if SINGLE in top:
        return [SINGLE]
    groups: dict[str, list[str]] = {}
    for name in top:
        match = _SHARD.fullmatch(name)
        groups.setdefault(match["stem"] + "-*" if match else name, []).append(name)
    if "model-*" in groups:
        groups = {"model-*": groups["model-*"]}
    if len(groups) == 1:
        shards = next(iter(groups.values()))
        _check_numbers(store.place, shards)
        return shards
    if groups:
        raise CheckpointError(
            f"{store.place} has several safetensors files and no index ({', '.join(top[:4])}); name the file to read"
        )
    store.refuse_dead_links()
    strange = next((n for n in sorted(names) if ".safetensors (" in n), None)
    if strange:
        raise CheckpointError(f"{store.place} holds no .safetensors weights that can be read: {strange}")
    other = next((n for n in sorted(names) if n.endswith(OTHER_WEIGHTS)), None)
    hint = f"; {other} is in another format, save it as safetensors first" if other else ""
    raise CheckpointError(f"{store.place} holds no .safetensors weights{hint}")


def _check_numbers(place: str, shards: list[str]) -> None:
    """Only "-of-N" betrays a missing shard without an index. Real numbers run 1..N, 0..N-1 or 0..N."""
    matches = [m for m in map(_SHARD.fullmatch, shards) if m]
    if len({m["count"] for m in matches}) > 1:
        raise CheckpointError(f"{place} mixes shards of several checkpoints ({shards[0]}, {shards[-1]})")
    if not matches or matches[0]["count"] is None:
        return
    count, numbers = int(matches[0]["count"]), [int(m["number"]) for m in matches]
    if sorted(numbers) not in (list(range(1, count + 1)), list(range(count)), list(range(count + 1))):
        missing = next((n for n in range(1, count + 1) if n not in set(numbers)), None)
        detail = f"shard {missing} of {count} is missing" if missing is not None else "a shard number is off"
        raise CheckpointError(f"{place} has no index and its shards are not complete: {detail}")
