"""One process writes an output folder at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
from pathlib import Path
from types import TracebackType

from halfbyte.checkpoint.files import reason
from halfbyte.checkpoint.writer import partial_name
from halfbyte.errors import OutputBusyError, OutputError

try:
    import fcntl
except ImportError:  # no such locks on this system: the process number alone has to do
    fcntl = None  # type: ignore[assignment]

FOLDER = ".halfbyte"
LOCK = "lock"
# a link could lead to any file, which would be emptied
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class OutputLock:
    """Holds ``<folder>/.halfbyte/lock`` while a conversion writes there; OutputError if another process does.

    The system gives the lock back when its process ends, however it ends; the file says which process holds it.
    Where a file system knows no locks, a living process of that number on this machine counts as its holder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FOLDER / LOCK
        self._descriptor: int | None = None

    def __enter__(self) -> OutputLock:
        try:
            while not self._acquire():
                pass  # the file that was locked had just been removed by the process before
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written ({reason(error)})") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
        with contextlib.suppress(OSError):  # not empty: the journal stays
            self.path.parent.rmdir()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _acquire(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        except FileNotFoundError:  # the folder vanished meanwhile
            return False
        try:
            if not lock(descriptor) and _alive(descriptor):
                raise self._busy(descriptor)
            if not _still_there(descriptor, self.path):
                os.close(descriptor)
                return False
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {platform.node()}\n".encode(), 0)
        except BlockingIOError:
            busy = self._busy(descriptor)
            os.close(descriptor)
            raise busy from None
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def _busy(self, descriptor: int) -> OutputBusyError:
        pid, host = _holder(descriptor)
        who = f"process {pid} on {host}" if pid else "another process"
        return OutputBusyError(f"{who} is writing {self.folder} right now; wait until it has ended, or stop it")


def remove_leftovers(folder: Path, names: list[str], attempt: str = "") -> None:
    """Remove what killed runs, or one ``attempt``, left of files that were never finished, and nothing else."""
    for name in names:
        with contextlib.suppress(OSError):
            (folder / partial_name(name, attempt)).unlink()


def remove_remains(folder: Path) -> None:
    """Remove the inner folder of a conversion that was killed after its last file."""
    with contextlib.suppress(OSError), OutputLock(folder):
        shutil.rmtree(folder / FOLDER, ignore_errors=True)


def lock(descriptor: int) -> bool:
    """Lock a file or folder; BlockingIOError if another process has it, False where locks are unknown."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise BlockingIOError(error.errno, os.strerror(error.errno)) from error
        return False
    return True


def _holder(descriptor: int) -> tuple[int, str]:
    words = os.pread(descriptor, 300, 0).decode(errors="replace").split()
    return (int(words[0]), words[1]) if len(words) == 2 and words[0].isdecimal() else (0, "")


def _alive(descriptor: int) -> bool:
    """Whether the process that the file names runs, as far as can be seen from here."""
    pid, host = _holder(descriptor)
    return bool(pid) and host == platform.node() and pid != os.getpid() and is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine, as far as can be seen from here."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file or folder; OSError where it cannot be opened."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        lock(descriptor)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _still_there(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)
