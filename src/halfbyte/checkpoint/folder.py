"""Which files of a checkpoint folder are weights, which travel along unchanged, and which are left out."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from halfbyte.checkpoint.adapter import check_no_adapter
from halfbyte.checkpoint.config import CONFIG
from halfbyte.checkpoint.files import check_link, check_unicode, parse_object, printable, read_small, reason
from halfbyte.checkpoint.foreign import check_plain
from halfbyte.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Weights in other formats (and their indexes): another copy of the model, never side files.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx", ".bin.index.json")

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


def scan(root: Path, only: str | None = None) -> Contents:
    """Sort the files of ``root``; with ``only``, that one safetensors file is the checkpoint."""
    names = _list(root)
    top = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n)
    index_name = None if only else find_index(names)
    if only:
        contents = Contents([only])
    elif index_name:
        index, metadata = read_index(root / index_name)
        contents = Contents(sorted(set(index.values())), index, metadata)
    else:
        check_no_adapter(root, [], names if not top else ())
        contents = Contents(_without_index(root, top, names))
    check_no_adapter(root, contents.weights, names)
    for name, size in sorted(names.items()):
        read = name in contents.weights or name in (index_name, CONFIG)
        if not read and (size is None or not belongs(name, size)):
            contents.ignored.append(printable(name))
        elif printable(name) != name:
            raise CheckpointError(f"the file name {printable(name)} in {root} is not UTF-8; rename or remove the file")
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


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(tensor -> shard, metadata) of an index file, with shard names that stay inside the folder."""
    table = parse_object(read_small(path), path.name)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name} has no weight_map from tensors to files")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{path.name} maps tensor {name} to something that is no file name")
    files = set(weight_map.values())
    check_unicode([*weight_map, *files], path.name)
    for file in files:
        if not is_plain_path(file):
            raise CheckpointError(
                f"{path.name} names the file {file[:200]!r}, which is no plain path inside its folder"
            )
    metadata = table.get("metadata")
    if not isinstance(metadata, dict):
        return weight_map, {}
    check_plain(metadata, f"metadata of {path.name}")
    return weight_map, metadata


def is_too_long(file: str) -> bool:
    """Whether no file system can have a file of this name."""
    return any(len(part.encode(errors="surrogatepass")) > 255 for part in file.split("/")) or len(file) > 1024


def _list(root: Path) -> dict[str, int | None]:
    """Visible files of the folder and its direct sub-folders -> bytes; None for what is never copied, with its kind.

    That are deeper folders ("a/b/"), pipes, sockets, devices ("a (a pipe)") and links to nothing.
    """
    sizes: dict[str, int | None] = {}
    try:
        for path in root.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                if path.is_symlink():
                    check_link(root, path)
                    if path.samefile(root):
                        sizes[f"{path.name}/ (a link to the folder itself)"] = None
                        continue
                for inner in path.iterdir():
                    if not inner.name.startswith("."):
                        _note(sizes, root, inner, f"{path.name}/{inner.name}")
            else:
                _note(sizes, root, path, path.name)
    except OSError as error:
        raise CheckpointError(f"{root} cannot be listed ({reason(error)})") from error
    return sizes


def _note(sizes: dict[str, int | None], root: Path, path: Path, name: str) -> None:
    if path.is_symlink() and (path.exists() or not name.endswith((".safetensors", *OTHER_WEIGHTS))):
        check_link(root, path)
    if path.is_dir():
        sizes[name + "/"] = None
    elif path.is_file():
        sizes[name] = path.stat().st_size
    else:
        sizes[f"{name} ({_kind(path)})"] = None


def _kind(path: Path) -> str:
    """What a path is that is neither a file nor a folder."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a link to nothing"
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((kind for test, kind in kinds.items() if test(mode)), "no regular file")


def _without_index(root: Path, top: list[str], names: dict[str, int | None]) -> list[str]:
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
        _check_numbers(root, shards)
        return shards
    if groups:
        raise CheckpointError(
            f"{root} has several safetensors files and no index ({', '.join(top[:4])}); name the file to read"
        )
    for path in sorted(root.iterdir()):
        if path.name.endswith(".safetensors") and path.is_symlink():
            check_link(root, path)
    strange = next((n for n in sorted(names) if ".safetensors (" in n), None)
    if strange:
        raise CheckpointError(f"{root} holds no .safetensors weights that can be read: {strange}")
    other = next((n for n in sorted(names) if n.endswith(OTHER_WEIGHTS)), None)
    hint = f"; {other} is in another format, save it as safetensors first" if other else ""
    raise CheckpointError(f"{root} holds no .safetensors weights{hint}")


def _check_numbers(root: Path, shards: list[str]) -> None:
    """Only "-of-N" betrays a missing shard without an index. Real numbers run 1..N, 0..N-1 or 0..N."""
    matches = [m for m in map(_SHARD.fullmatch, shards) if m]
    if len({m["count"] for m in matches}) > 1:
        raise CheckpointError(f"{root} mixes shards of several checkpoints ({shards[0]}, {shards[-1]})")
    if not matches or matches[0]["count"] is None:
        return
    count, numbers = int(matches[0]["count"]), [int(m["number"]) for m in matches]
    if sorted(numbers) not in (list(range(1, count + 1)), list(range(count)), list(range(count + 1))):
        missing = next((n for n in range(1, count + 1) if n not in set(numbers)), None)
        detail = f"shard {missing} of {count} is missing" if missing is not None else "a shard number is off"
        raise CheckpointError(f"{root} has no index and its shards are not complete: {detail}")
