"""One request on its way to a backend and back: escalation, streams, cancellation, errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from halfbyte.serve.backends import Backend
from halfbyte.serve.event_stream import EventSplitter, TokenCount, error_body, error_event
from halfbyte.serve.limits import Full, Gate

# statuses by which an engine, or what stands before it, says that it is not there
DOWN = frozenset({502, 503})
HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade "  # noqa: SIM905
    "content-length date server x-halfbyte-precision x-halfbyte-rule".split()
)
"""Headers of a backend that are its own; the router writes these itself."""
CLOSED = 499
"""The status that is counted for a client that went away."""


@dataclass
class Outcome:
    """What became of a request, for logs and metrics."""

    precision: str
    rule: str
    status: int = CLOSED
    first: float | None = None
    seconds: float = 0.0
    count: TokenCount = field(default_factory=TokenCount)
    problem: str = ""
    head: bytes = b""


class Relay:
    """An ASGI response that asks backends in order until one answers, and passes its bytes on."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        candidates: list[Backend],
        path: str,
        body: dict[str, Any],
        wanted: str,
        rule: str,
        gate: Gate,
        seconds: float,
        finished: Callable[[Outcome], None],
    ) -> None:
        self._client, self._candidates, self._path, self._body = client, candidates, path, body
        self._gate, self._limit, self._finished = gate, seconds, finished
        self._wanted = wanted
        self._rule = rule
        self._started = False
        self._events = False
        self._begin = time.monotonic()
        self.outcome = Outcome(self._wanted, rule)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a client that goes away or a time limit ends the request to the backend."""
        forward = asyncio.ensure_future(self._forward(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            done, _ = await asyncio.wait({forward, gone}, timeout=self._limit, return_when=asyncio.FIRST_COMPLETED)
            if forward in done:
                forward.result()
            elif not done:
                await _cancel(forward)
                await self._fail(scope, receive, send, 504, f"no answer within {self._limit:g} s", "timeout")
        finally:
            await _cancel(forward)
            await _cancel(gone)
            self.outcome.seconds = time.monotonic() - self._begin
            self._finished(self.outcome)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._gate.place():
                await self._try_all(scope, receive, send)
        except Full:
            headers = {"retry-after": "1"}
            await self._fail(scope, receive, send, 429, "too many requests are waiting", "queue_full", headers)

    async def _try_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = ""
        for backend in self._candidates:
            self.outcome.precision = backend.name
            try:
                if await self._ask(backend, send):
                    return
                problem = "it is not ready"
            except httpx.HTTPError as error:
                problem = type(error).__name__
                if self._started:
                    break
        self.outcome.problem = problem
        where = "in the middle of the answer" if self._started else "before it answered"
        message = f"the model server was lost {where} ({problem}); the next request may succeed"
        await self._fail(scope, receive, send, 502, message, "backend_lost")

    async def _ask(self, backend: Backend, send: Send) -> bool:
        """Pass one backend's answer on; False where it says that it is down."""
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if backend.api_key:
            headers["authorization"] = f"Bearer {backend.api_key}"
        content = json.dumps({**self._body, "model": backend.model}).encode()
        async with self._client.stream(
            "POST", f"{backend.url}{self._path}", content=content, headers=headers
        ) as response:
            if response.status_code in DOWN:
                return False
            self._events = response.headers.get("content-type", "").startswith("text/event-stream")
            if self._events:
                await self._pass_events(response, backend, send)
            else:
                await self._pass_body(response, backend, send)
        return True

    async def _pass_events(self, response: httpx.Response, backend: Backend, send: Send) -> None:
        splitter, count = EventSplitter(), self.outcome.count
        await self._start(response, backend, send)
        async for chunk in response.aiter_raw():
            events = splitter.feed(chunk)
            if events:
                self._saw(events)
                count.see_events(events)
                await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": splitter.rest()})

    async def _pass_body(self, response: httpx.Response, backend: Backend, send: Send) -> None:
        # whole, so that a server that dies in the middle can still be replaced by the next
        body = b"".join([chunk async for chunk in response.aiter_raw()])
        self._saw(body)
        if response.status_code == 200:
            self.outcome.count.see_body(body)
        await self._start(response, backend, send, len(body))
        await send({"type": "http.response.body", "body": body})

    def _saw(self, data: bytes) -> None:
        if self.outcome.first is None:
            self.outcome.first = time.monotonic() - self._begin
            self.outcome.head = data[:4096]

    async def _start(self, response: httpx.Response, backend: Backend, send: Send, length: int | None = None) -> None:
        headers = [(k.lower(), v) for k, v in response.headers.raw if k.lower().decode("latin-1") not in HOP_BY_HOP]
        headers += [(k.encode(), v.encode()) for k, v in self._own_headers(backend.name).items()]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        self._started = True
        self.outcome.status = response.status_code
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})

    def _own_headers(self, precision: str) -> dict[str, str]:
        rule = self._rule if precision == self._wanted else f"{self._rule}; {self._wanted} is down"
        return {"x-halfbyte-precision": precision, "x-halfbyte-rule": rule}

    async def _fail(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        status: int,
        message: str,
        code: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        """End with an error: as a status where nothing was sent yet, else as an event."""
        self.outcome.status = status
        self.outcome.problem = self.outcome.problem or code
        if not self._started:
            kind = "rate_limit_error" if status == 429 else "server_error"
            both = {**self._own_headers(self.outcome.precision), **(headers or {})}
            response = JSONResponse(error_body(message, kind, code), status, both)
            await response(scope, receive, send)
        elif self._events:
            await send({"type": "http.response.body", "body": error_event(self._path, message, code)})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: Awaitable[Any]) -> None:
    future = asyncio.ensure_future(task)
    if not future.done():
        future.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await future
