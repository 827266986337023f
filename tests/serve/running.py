"""Routers and engines that run while a test does: an engine is a process, a router a thread of this one."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import uvicorn

from halfbyte.serve.backends import Backend, Backends
from halfbyte.serve.decision import Precision
from halfbyte.serve.router import Router, RouterOptions
from halfbyte.serve.routing_rules import RoutingRules, parse_rules

ENGINE = Path(__file__).parent / "engine_process.py"
RULES = parse_rules("default: w4\nrules: [{name: coding, precision: w16, keywords: [code]}]", "rules")
BITS = {"w4": 4.5, "w8": 8.0, "w16": 16.0}


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def wait_for(url: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end, url
        time.sleep(0.05)


@contextmanager
def engine(name: str) -> Iterator[tuple[Backend, subprocess.Popen[bytes]]]:
    port = free_port()
    process = subprocess.Popen([sys.executable, str(ENGINE), str(port), name])
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/health")
        yield Backend(Precision(name, BITS[name]), url, f"model-of-{name}", "test"), process
    finally:
        process.kill()
        process.wait()


class Served:
    """A router with its address, the engines behind it and the lines that it logged."""

    def __init__(self, url: str, router: Router, processes: dict[str, subprocess.Popen[bytes]], log: list[str]) -> None:
        self.url, self.router, self.processes, self.log = url, router, processes, log
        self.port = int(url.rpartition(":")[2])

    def post(
        self, path: str = "/v1/chat/completions", headers: dict[str, str] | None = None, **body: object
    ) -> httpx.Response:
        body.setdefault("messages", [{"role": "user", "content": "hello"}])
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, trust_env=False, timeout=60)

    def state(self, name: str) -> dict:  # type: ignore[type-arg]
        return httpx.get(f"{self.router.backends[name].url}/state", trust_env=False).json()


@contextmanager
def served(
    *names: str,
    rules: RoutingRules | None = RULES,
    options: RouterOptions | None = None,
    backends: list[Backend] = [],  # noqa: B006
) -> Iterator[Served]:
    log: list[str] = []
    with ExitStack() as stack:
        started = {name: stack.enter_context(engine(name)) for name in names}
        router = Router(Backends([*(b for b, _ in started.values()), *backends]), rules, options or RouterOptions())
        object.__setattr__(router.options, "log", log.append)
        port = free_port()
        config = uvicorn.Config(router.app(), host="127.0.0.1", port=port, log_level="error", lifespan="on")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            wait_for(f"http://127.0.0.1:{port}/health") if any(b.healthy for b in router.backends) else time.sleep(1)
            yield Served(f"http://127.0.0.1:{port}", router, {n: p for n, (_, p) in started.items()}, log)
        finally:
            server.should_exit = True
            thread.join(15)
