"""Byte ranges and strict JSON: the few file operations that everything else in this package stands on."""

from __future__ import annotations

import gc
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from halfbyte.errors import CheckpointError

# One system call moves at most 2 GiB - 4 KiB on Linux and fails beyond that on macOS.
_LARGEST_READ = 1 << 30
#: Configurations and indexes of the largest models have a few MB.
MAX_SMALL_BYTES = 200_000_000


def open_regular(path: Path) -> tuple[int, int]:
    """Open a regular file: (file descriptor, size in bytes). CheckpointError when that is impossible."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise CheckpointError(f"{path} is not a regular file")
        # without waiting, should a pipe take its place meanwhile
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)})") from error
    return descriptor, status.st_size


def check_link(root: Path, path: Path) -> None:
    """Refuse a link that leads out of a checkpoint's folder, or to nothing.

    Links into the hub cache's own blobs (snapshots/REV/f -> ../../blobs/HASH) are followed. A stranger's folder must
    not put the content of other files into an output.
    """
    try:
        base, target = Path(os.path.realpath(root)), Path(os.path.realpath(path))
        if target.is_relative_to(base) and target.exists():
            return
        cached = base.parent.name == "snapshots" and target.parent == base.parent.parent / "blobs"
        there = target.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be followed ({reason(error)})") from error
    if not there:
        raise CheckpointError(f"{path} is a link to a file that is not there; restore or remove it")
    if not cached:
        raise CheckpointError(
            f"{path} is a link to {target}, outside of the checkpoint's folder, and is not followed; copy the file "
            "there or remove the link"
        )


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` (bytes) from ``offset``; returns the bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(view):
        part = view[done : done + _LARGEST_READ]
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [part], offset + done)
        else:
            data = os.pread(descriptor, len(part), offset + done)
            count = len(data)
            part[:count] = data
        if count == 0:
            break
        done += count
    return done


def is_cached(descriptor: int, size: int) -> bool:
    """Whether most of a file seems to lie in the system's page cache; True where that cannot be found out."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    byte, hits = bytearray(1), 0
    places = range(size // 32, size, max(1, size // 16))
    for place in places:
        try:
            hits += os.preadv(descriptor, [byte], place, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError:  # not every file system can say
            return True
    return 2 * hits >= len(places)


def forget_pages(descriptor: int, offset: int, size: int) -> None:
    """Let the system write these bytes back, where they are new, and drop them from its page cache."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # only advice
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def read_small(path: Path, most: int = MAX_SMALL_BYTES) -> bytes:
    """Read a whole small file (config, index); CheckpointError for a pipe, a device or more than ``most`` bytes."""
    descriptor, size = open_regular(path)
    if size > most:
        os.close(descriptor)
        raise CheckpointError(f"{path} has {size} bytes; {most} are the limit for such a file")
    return _read_and_close(path, descriptor, size)


def read_start(path: Path, count: int) -> bytes:
    """Read the first bytes of a regular file, fewer where it is shorter."""
    return _read_and_close(path, open_regular(path)[0], count)


def _read_and_close(path: Path, descriptor: int, count: int) -> bytes:
    try:
        buffer = bytearray(count)
        return bytes(buffer[: read_into(descriptor, memoryview(buffer), 0)])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)})") from error
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """The short cause of an exception on one line, without the path that the message names already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable(name: str) -> str:
    """Spell a name for messages and files; those of other encodings hold unpaired surrogates."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def check_unicode(texts: Iterable[str], what: str) -> None:
    """Refuse unpaired surrogates, which JSON can spell but no output can hold or print."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{what} holds text with an unpaired surrogate") from None


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector: visiting 100,000 new objects again and again takes most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(f"the key {key!r} appears twice")
            seen.add(key)
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def parse_json(data: bytes, what: str, strict: bool = True) -> Any:
    """Parse UTF-8 JSON. ``what`` names the file in the CheckpointError.

    Strict (headers, indexes) refuses duplicate keys and NaN or Infinity; configs of real models hold such.
    """
    try:
        text = data.decode("utf-8")
        if strict:
            return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8 text (byte {error.start})") from error
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{what} is ambiguous: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({reason(error)})") from error


def parse_object(data: bytes, what: str, strict: bool = True) -> dict[str, Any]:
    """Like :func:`parse_json`, for files whose outermost value must be an object."""
    value = parse_json(data, what, strict)
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must hold a JSON object, not {type(value).__name__}")
    return value
