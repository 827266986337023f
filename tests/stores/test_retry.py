from __future__ import annotations

import pytest

from halfbyte.stores import retry
from halfbyte.stores.retry import ATTEMPTS, PassingError, asked_wait, retrying


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", found.append)
    return found


def failing(times: int, wait: float | None = None):
    left = [times]

    def call() -> str:
        if left[0]:
            left[0] -= 1
            raise PassingError("busy", wait)
        return "done"

    return call


def test_pauses_double_until_it_works(waits: list[float]) -> None:
    assert retrying(failing(4)) == "done"
    assert len(waits) == 4
    assert all(0.25 * 2**i <= wait <= 0.5 * 2**i for i, wait in enumerate(waits))


def test_the_last_failure_is_raised(waits: list[float]) -> None:
    with pytest.raises(PassingError, match="busy"):
        retrying(failing(ATTEMPTS))
    assert len(waits) == ATTEMPTS - 1


def test_a_wait_that_the_server_asks_for_is_kept_within_bounds(waits: list[float]) -> None:
    retrying(failing(1, 7.0))
    retrying(failing(1, 1e6))
    assert waits == [7.0, retry.LONGEST_WAIT]


def test_other_errors_end_it_at_once(waits: list[float]) -> None:
    with pytest.raises(ZeroDivisionError):
        retrying(lambda: 1 // 0)
    assert not waits


@pytest.mark.parametrize(("text", "seconds"), [("3", 3.0), (None, None), ("", None), ("Wed, 21 Oct 2026", None)])
def test_retry_after_is_read(text: str | None, seconds: float | None) -> None:
    assert asked_wait(text) == seconds
