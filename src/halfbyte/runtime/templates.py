"""Chat templates of strangers, with limits of time and memory."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.runtime.template_operators import bounded_memory, bounded_operators

SECONDS = 5.0
"""A template takes milliseconds; transformers' sandbox bounds neither loops within loops nor their time."""

# limits of memory are the whole process's
_one_at_a_time = threading.RLock()


class TemplateTimeoutError(Exception):
    """Raised inside a template that takes too long."""


def apply_template(tokenizer: Any, messages: Sequence[Any], seconds: float = SECONDS, **options: Any) -> Any:
    """``tokenizer.apply_chat_template(messages, **options)``; HalfbyteError after ``seconds``."""
    with template_limit(seconds):
        return tokenizer.apply_chat_template(messages, **options)


@contextlib.contextmanager
def template_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Spell one conversation within this context; HalfbyteError after ``seconds``, or for a GB of memory."""
    try:
        with _one_at_a_time, bounded_operators(), bounded_memory(), _time_limit(seconds):
            yield
    except (MemoryError, RecursionError) as error:
        raise HalfbyteError(
            f"the chat template needs too much memory for one conversation ({type(error).__name__}); repair the "
            "tokenizer's template, or measure on a text"
        ) from None
    except TemplateTimeoutError:
        raise HalfbyteError(
            f"the chat template takes longer than {seconds:g} s for one conversation; repair the tokenizer's template, "
            "or measure on a text"
        ) from None


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TemplateTimeoutError in this thread, whichever it is, between two steps of Python."""
    thread, lock = threading.get_ident(), threading.Lock()
    state = {"ended": False, "late": False}

    def stop() -> None:
        with lock:
            if not state["ended"]:
                state["late"] = True
                _raise_in(thread, TemplateTimeoutError)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            state["ended"] = True
        if state["late"]:
            _raise_in(thread, None)  # where it has not been delivered yet
    if state["late"]:
        raise TemplateTimeoutError


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)
