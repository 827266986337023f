"""From what a user types to a folder on this machine: a folder, one safetensors file, or an id on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from halfbyte.checkpoint.files import read_small, reason
from halfbyte.checkpoint.folder import SINGLE, find_index, read_index
from halfbyte.checkpoint.listing import OTHER_WEIGHTS
from halfbyte.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Source:
    """root: folder; file: the one safetensors file that was named, else None; revision: the hub's commit."""

    root: Path
    file: str | None = None
    revision: str | None = None


def resolve(source: str | Path, revision: str | None = None) -> Source:
    """Find a checkpoint. Only an ``owner/name`` that is no local path is looked up on the hub.

    ``HF_HUB_OFFLINE=1`` and the cache work as in huggingface_hub. CheckpointError when there is nothing.
    """
    text = str(source)
    path = Path(text).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{text!r} is no usable path ({reason(error)})") from error
    if not exists:
        if path.is_symlink():
            raise CheckpointError(f"{text} is a link to something that is not there")
        if not isinstance(source, str) or not _looks_like_hub_id(text):
            raise CheckpointError(f"{text!r} does not exist here and is no hub id of the form owner/name")
        return _from_hub(text, revision)
    if revision is not None:
        raise CheckpointError(f"{text} is a local path; a revision ({revision}) only applies to a hub id")
    if path.is_dir():
        return Source(path)
    if path.suffix not in (".safetensors", ".gguf"):
        raise CheckpointError(f"{text} is neither a folder nor a .safetensors or .gguf file")
    return Source(path.parent, path.name)


def is_hub_id(text: str) -> bool:
    """Whether a text is no path of this machine and has the form owner/name."""
    try:
        path = Path(text).expanduser()
        there = path.exists() or path.is_symlink()
    except (OSError, ValueError):
        return False
    return not there and _looks_like_hub_id(text)


def _looks_like_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text)) and not text.endswith(".safetensors")


def _from_hub(repository: str, revision: str | None) -> Source:
    """Small files first: they tell which weights are needed, so no second copy of them is fetched."""
    others = [f"*{suffix}" for suffix in OTHER_WEIGHTS]
    hidden = [".*", "*/.*"]
    root = _download(repository, revision, None, ["*.safetensors", *others, *hidden])
    commit = root.name
    # A repository of nothing but weights has no folder yet.
    index = find_index(path.name for path in root.iterdir()) if root.is_dir() else None
    wanted = [SINGLE, "model-*.safetensors"]
    if index:
        wanted = sorted(set(read_index(read_small(root / index), index)[0].values()))
    _download(repository, commit, wanted, None)
    if not index and not any(root.glob("*.safetensors")):
        _download(repository, commit, ["*.safetensors"], ["*/*"])
    return Source(root, None, commit)


def _download(repository: str, revision: str | None, allow: list[str] | None, ignore: list[str] | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
    except Exception as error:  # network, permission, cache, validation: each library layer has its own type
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{repository} is no local path and cannot be fetched from the hub{at}"
            f" ({type(error).__name__}: {reason(error)})"
        ) from error
    return Path(folder)
