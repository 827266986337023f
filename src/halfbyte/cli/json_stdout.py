"""Standard output for one JSON document only: whatever else is printed meanwhile, also by C code, goes to stderr."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

STDOUT, STDERR = 1, 2
_waiting: list[list[str]] = []  # the documents of each command that runs now


def write_document(text: str) -> None:
    """Write a document to stdout: at once, or inside ``only_documents`` when that ends."""
    if _waiting:
        _waiting[-1].append(text)
    else:
        sys.stdout.write(text)


@contextmanager
def only_documents() -> Iterator[None]:
    """Send what is printed to stderr, except for what ``write_document`` gets, which is printed at the end.

    File descriptor 1 itself is redirected, so that libraries in C and child processes are caught as well. Documents
    of a command that fails are not printed. OSError where stdout cannot be written.
    """
    documents: list[str] = []
    _waiting.append(documents)
    try:
        with _redirected_descriptor(), redirect_stdout(sys.stderr):
            yield
    finally:
        _waiting.pop()
    sys.stdout.write("".join(documents))


def divert_the_rest() -> None:
    """Flush stdout, then send to stderr what libraries print until the process ends."""
    sys.stdout.flush()
    os.dup2(STDERR, STDOUT)


@contextmanager
def _redirected_descriptor() -> Iterator[None]:
    """Make descriptor 1 another name of stderr; does nothing in a process without descriptor 1."""
    stream = sys.stdout
    _flush(stream)
    if _is_closed(STDOUT):
        yield
        return
    if _is_closed(STDERR):
        _drop_stderr()
    saved = os.dup(STDOUT)
    try:
        os.dup2(STDERR, STDOUT)
        yield
    finally:
        _flush(stream)  # what still waits in buffers was printed while stdout was diverted
        os.dup2(saved, STDOUT)
        os.close(saved)


def _drop_stderr() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != STDERR:
        os.dup2(null, STDERR)
        os.close(null)


def _is_closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False


def _flush(stream: object) -> None:
    """Empty the buffers of Python's stdout and of C's."""
    with suppress(OSError, ValueError, AttributeError):
        stream.flush()  # type: ignore[attr-defined]
    with suppress(OSError, AttributeError):
        ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)
