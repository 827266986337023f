"""Model servers as child processes: started, watched, restarted with back-off, stopped without orphans."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from halfbyte.errors import HalfbyteError
from halfbyte.serve import guard
from halfbyte.serve.backends import Backend
from halfbyte.serve.engine_commands import Launch

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
STEADY = 60.0
"""Seconds after which a server that ran well starts over with the shortest pause."""
CHECK = 1.0
MISSED = 5
"""Health checks in a row without an answer that mark a server as down."""
_TAIL, _TAIL_BYTES = 15, 1 << 14

HOST = "127.0.0.1"


def free_port() -> int:
    """Return a port of the loopback address that nothing listens on now."""
    with socket.socket() as held:
        held.bind((HOST, 0))
        return int(held.getsockname()[1])


class Server:
    """One model server: its process, its log file, and the backend through which the router sees it."""

    def __init__(
        self, backend: Backend, launch: Callable[[int], Launch], log: Path, tell: Callable[[str], None]
    ) -> None:
        self.backend = backend
        self._launch, self._log, self._tell = launch, log, tell
        self._process: asyncio.subprocess.Process | None = None
        backend.healthy = False

    @property
    def pid(self) -> int | None:
        """The process of the guard, which leads the server's process group."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the process on a free port."""
        port = free_port()
        launch = self._launch(port)
        self.backend.url, self.backend.model = f"http://{HOST}:{port}", launch.model
        with self._log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", guard.__file__, *launch.command),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **launch.environment},
                start_new_session=True,
            )

    async def wait_until_ready(self, client: httpx.AsyncClient) -> None:
        """Wait for the first good health check; HalfbyteError with the end of the log if the process ends before."""
        assert self._process
        while self._process.returncode is None:
            if await self._is_healthy(client):
                self.backend.healthy = True
                return
            await asyncio.sleep(0.2)
        self._end_group()
        raise HalfbyteError(
            f"the server of {self.backend.name} ({self.backend.engine}) did not start: {self.log_tail()}"
        )

    async def watch(self, client: httpx.AsyncClient) -> None:
        """Check the health for ever; start the process again when it ends, each time after a longer pause."""
        pause, since = FIRST_PAUSE, time.monotonic()
        while True:
            await self._until_it_ends(client)
            self.backend.healthy = False
            self._end_group()
            pause = FIRST_PAUSE if time.monotonic() - since > STEADY else pause
            self._tell(f"{self.backend.name}: the server ended; again in {pause:g} s: {self.log_tail()}")
            await asyncio.sleep(pause)
            pause, since = min(2 * pause, LONGEST_PAUSE), time.monotonic()
            self.backend.restarts += 1
            try:
                await self.start()
                await self.wait_until_ready(client)
                self._tell(f"{self.backend.name}: the server is back")
            except HalfbyteError:
                continue

    async def stop(self) -> None:
        """End the process group: politely, then by force."""
        process = self._process
        if process is None:
            return
        if process.stdin and process.returncode is None:
            process.stdin.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), guard.GRACE + 5)
        self._end_group()

    def log_tail(self) -> str:
        """Return the last lines of the server's output in one line."""
        end = read_end(self._log, _TAIL_BYTES) if self._log.is_file() else b""
        lines = end.decode("utf-8", "replace").splitlines()
        return " | ".join(line.strip() for line in lines[-_TAIL:] if line.strip()) or "it printed nothing"

    async def _until_it_ends(self, client: httpx.AsyncClient) -> None:
        missed = 0
        while self._process and self._process.returncode is None:
            missed = 0 if await self._is_healthy(client) else missed + 1
            self.backend.healthy = missed < MISSED
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), CHECK)

    async def _is_healthy(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.backend.url}/health", timeout=5)).status_code == 200
        except httpx.HTTPError:
            return False

    def _end_group(self) -> None:
        """Leave nothing of a group whose guard has ended."""
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def read_end(path: Path, most: int) -> bytes:
    """Read the last bytes of a file, at most so many: logs of a server that ran for weeks may be large."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read()


class Supervisor:
    """All servers of one ``halfbyte serve``."""

    def __init__(self, starts: list[tuple[Backend, Callable[[int], Launch]]], tell: Callable[[str], None]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="halfbyte-serve-")
        folder = Path(self._folder.name)
        self.servers = [Server(backend, launch, folder / f"{backend.name}.log", tell) for backend, launch in starts]

    async def start(self) -> None:
        """Start all servers and wait until each is ready; HalfbyteError if one does not start."""
        async with httpx.AsyncClient(trust_env=False) as client:
            for server in self.servers:
                await server.start()
            await asyncio.gather(*(server.wait_until_ready(client) for server in self.servers))

    async def watch(self) -> None:
        """Keep all servers running until cancelled."""
        async with httpx.AsyncClient(trust_env=False) as client:
            await asyncio.gather(*(server.watch(client) for server in self.servers))

    async def stop(self) -> None:
        """Stop all servers at once and remove their logs."""
        await asyncio.gather(*(server.stop() for server in self.servers), return_exceptions=True)
        self._folder.cleanup()
