"""Servers as processes: ready, restarted, stopped, and gone with whoever started them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from tests.serve.running import ENGINE

from halfbyte.errors import HalfbyteError
from halfbyte.serve import guard
from halfbyte.serve.backends import Backend
from halfbyte.serve.decision import Precision
from halfbyte.serve.engine_commands import Launch
from halfbyte.serve.supervisor import Supervisor


def start_of(*command: str) -> tuple[Backend, object]:
    backend = Backend(Precision("w4", 4.0), "", "", "test")
    return backend, lambda port: Launch("test", tuple(w.replace("PORT", str(port)) for w in command), {}, "m")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pid_of(backend: Backend) -> int:
    return int(httpx.get(f"{backend.url}/state", trust_env=False).json()["pid"])


async def until(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


def test_a_killed_server_is_started_again_and_none_is_left_in_the_end() -> None:
    lines: list[str] = []
    backend, launch = start_of(sys.executable, str(ENGINE), "PORT", "w4")
    supervisor = Supervisor([(backend, launch)], lines.append)  # type: ignore[list-item]

    async def main() -> list[int]:
        await supervisor.start()
        assert backend.healthy and backend.model == "m"
        watching = asyncio.ensure_future(supervisor.watch())
        first = pid_of(backend)
        os.kill(first, signal.SIGKILL)
        await until(lambda: not backend.healthy)
        await until(lambda: backend.healthy)
        second = pid_of(backend)
        watching.cancel()
        await supervisor.stop()
        return [first, second, supervisor.servers[0].pid or 0]

    pids = asyncio.run(main())
    assert backend.restarts == 1 and len(set(pids)) == 3 and not any(map(is_alive, pids))
    assert "the server ended; again in 1 s" in lines[0] and "exit code -9" in lines[0] and "is back" in lines[1]


def test_a_server_that_does_not_start_shows_the_end_of_its_output() -> None:
    backend, launch = start_of(sys.executable, "-c", "raise SystemExit('no such model')")
    supervisor = Supervisor([(backend, launch)], print)  # type: ignore[list-item]

    async def main() -> None:
        try:
            await supervisor.start()
        finally:
            await supervisor.stop()

    with pytest.raises(HalfbyteError, match=r"w4 \(test\) did not start: no such model"):
        asyncio.run(main())


def test_servers_end_with_the_program_that_started_them(tmp_path: Path) -> None:
    server = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    command = [sys.executable, guard.__file__, sys.executable, "-c", server]
    parent = (
        f"import subprocess, time; subprocess.Popen({command!r}, stdin=subprocess.PIPE, start_new_session=True); "
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    asyncio.run(until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()))
    pid = int((tmp_path / "pid").read_text())
    assert is_alive(pid)
    process.kill()
    process.wait()
    asyncio.run(until(lambda: not is_alive(pid)))
