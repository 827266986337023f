"""Jobs on threads: their tasks side by side, what follows a job in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from halfbyte.kernels import backend, use_backend_here

Task = Callable[[], None]
Stages = Iterator[list[Task]]
"""The tasks of one list may run side by side; the next list is asked for when all of them are done."""


@dataclass
class _Job:
    stages: Stages
    done: Callable[[], None]
    left: int = 0


class Pipeline:
    """Runs the tasks of jobs on ``threads`` threads, in order.

    The first exception of any task stops everything: tasks that have not begun are skipped, and ``add``, ``wait``
    and ``finish`` raise it.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "halfbyte", use_backend_here, (backend(),))
        self._behind = ThreadPoolExecutor(1, "halfbyte-commit", use_backend_here, (backend(),))
        self._changed = threading.Condition()
        self._unfinished = self._pending = 0
        self._failure: BaseException | None = None

    def add(self, stages: Stages, done: Callable[[], None]) -> None:
        """Begin a job, as soon as few others are unfinished; ``done`` is called in one of the threads."""
        # two more than there are threads, so that none of them ever waits for the next job
        self.wait(lambda: self._unfinished < self._threads + 2)
        with self._changed:
            self._unfinished += 1
        self._advance(_Job(stages, done))

    def later(self, call: Callable[[], None]) -> None:
        """Run something in the background, one after the other, beside the tasks."""
        with self._changed:
            self._pending += 1
        self._behind.submit(self._run_behind, call)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Return when ``ready``, which is asked whenever a job, or something in the background, has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or ready())
            if self._failure is not None:
                raise self._failure

    def finish(self) -> None:
        """Wait for everything that was begun."""
        self.wait(lambda: not self._unfinished and not self._pending)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._fail(error)
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished and not self._pending)
        self._pool.shutdown()
        self._behind.shutdown()

    def _advance(self, job: _Job) -> None:
        """Submit the next stage of a job, or end it."""
        tasks: list[Task] | None = []
        try:
            while tasks == [] and self._failure is None:
                tasks = next(job.stages, None)
            if tasks is None:
                job.done()
        except BaseException as error:
            self._fail(error)
        if tasks and self._failure is None:
            job.left = len(tasks)
            for task in tasks:
                self._pool.submit(self._run, job, task)
            return
        with self._changed:
            self._unfinished -= 1
            self._changed.notify_all()

    def _run(self, job: _Job, task: Task) -> None:
        try:
            if self._failure is None:
                task()
        except BaseException as error:
            self._fail(error)
        with self._changed:
            job.left -= 1
            last = not job.left
        if last:
            self._advance(job)

    def _run_behind(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self._fail(error)
        with self._changed:
            self._pending -= 1
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._changed.notify_all()
