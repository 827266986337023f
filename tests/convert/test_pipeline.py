from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from halfbyte.convert.pipeline import Pipeline, Stages, Task


def job(*stages: list[Task]) -> Stages:
    return iter(stages)


def nothing() -> None:
    pass


def test_a_stage_begins_when_all_tasks_of_the_one_before_are_done() -> None:
    seen: list[str] = []

    def slow() -> None:
        time.sleep(0.02)
        seen.append("first")

    with Pipeline(4) as pipeline:
        pipeline.add(job([slow, slow, slow], [lambda: seen.append("second")]), lambda: seen.append("done"))
        pipeline.finish()
    assert seen == ["first"] * 3 + ["second", "done"]


def test_an_empty_stage_is_passed_over() -> None:
    seen: list[str] = []
    with Pipeline(1) as pipeline:
        pipeline.add(job([], [lambda: seen.append("task")], []), lambda: seen.append("done"))
        pipeline.add(job(), lambda: seen.append("empty"))
        pipeline.finish()
    assert sorted(seen) == ["done", "empty", "task"]


def test_tasks_of_one_job_run_side_by_side() -> None:
    together = threading.Barrier(3, timeout=60)
    with Pipeline(3) as pipeline:
        pipeline.add(job([together.wait] * 3), nothing)
        pipeline.finish()


def test_no_more_jobs_are_begun_than_threads_can_use() -> None:
    go = threading.Event()
    begun = 0

    def stages() -> Iterator[list[Task]]:
        nonlocal begun
        begun += 1
        yield [lambda: bool(go.wait(60)) and None]

    def feed(pipeline: Pipeline) -> None:
        for _ in range(20):
            pipeline.add(stages(), nothing)

    with Pipeline(2) as pipeline:
        feeder = threading.Thread(target=feed, args=(pipeline,))
        feeder.start()
        while begun < 4:
            time.sleep(0.001)
        time.sleep(0.1)
        assert begun == 4
        go.set()
        feeder.join()
        pipeline.finish()
    assert begun == 20


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_the_first_failure_is_raised_and_what_has_not_begun_is_skipped(error: BaseException) -> None:
    seen: list[str] = []

    def fail() -> None:
        raise error

    with pytest.raises(type(error)), Pipeline(1) as pipeline:
        pipeline.add(job([fail, lambda: seen.append("task")], [lambda: seen.append("stage")]), nothing)
        pipeline.finish()
    assert seen == []


@pytest.mark.parametrize("where", ["stages", "done", "later"])
def test_failures_outside_of_tasks_are_raised_too(where: str) -> None:
    def fail() -> None:
        raise ValueError("broken")

    def failing() -> Iterator[list[Task]]:
        yield [nothing]
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), Pipeline(2) as pipeline:
        if where == "later":
            pipeline.later(fail)
        else:
            pipeline.add(failing() if where == "stages" else job([nothing]), fail if where == "done" else nothing)
        pipeline.finish()


def test_what_runs_in_the_background_runs_beside_tasks_and_one_after_the_other() -> None:
    order: list[int] = []
    meeting = threading.Barrier(2, timeout=60)

    def background(number: int) -> Callable[[], None]:
        def call() -> None:
            if not number:
                meeting.wait()
            order.append(number)

        return call

    with Pipeline(1) as pipeline:
        for number in range(5):
            pipeline.later(background(number))
        pipeline.add(job([lambda: bool(meeting.wait()) and None]), nothing)
        pipeline.finish()
    assert order == list(range(5))


def test_leaving_with_an_error_waits_for_tasks_that_run() -> None:
    ended = threading.Event()
    running = threading.Event()

    def task() -> None:
        running.set()
        time.sleep(0.05)
        ended.set()

    with pytest.raises(RuntimeError, match="outside"), Pipeline(1) as pipeline:
        pipeline.add(job([task]), nothing)
        running.wait(60)
        raise RuntimeError("outside")
    assert ended.is_set()
