"""Places and the queue."""

from __future__ import annotations

import asyncio

import pytest

from halfbyte.serve.limits import Full, Gate


def test_places_then_the_queue_then_nothing() -> None:
    async def main() -> None:
        gate = Gate(1, 1)
        async with gate.place():
            waiting = asyncio.ensure_future(_enter(gate))
            await asyncio.sleep(0)
            assert (gate.running, gate.waiting) == (1, 1)
            with pytest.raises(Full):
                await _enter(gate)
        assert await waiting == 1
        assert (gate.running, gate.waiting) == (0, 0)

    asyncio.run(main())


def test_who_stops_waiting_gives_the_queue_back() -> None:
    async def main() -> None:
        gate = Gate(1, 1)
        async with gate.place():
            waiting = asyncio.ensure_future(_enter(gate))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.sleep(0)
            assert gate.waiting == 0
        assert await _enter(gate) == 1

    asyncio.run(main())


async def _enter(gate: Gate) -> int:
    async with gate.place():
        return gate.running
