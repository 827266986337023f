"""The files of a folder of this machine, by name and size; links that lead out of it are refused."""

from __future__ import annotations

import stat
from pathlib import Path

from halfbyte.checkpoint.files import check_link, reason
from halfbyte.errors import CheckpointError

#: Weights in other formats (and their indexes): another copy of the model, never side files.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx", ".bin.index.json")


def list_folder(root: Path) -> dict[str, int | None]:
    """List the visible files of the folder and its direct sub-folders: name -> bytes, None for what is never copied.

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
