"""The router: OpenAI's endpoints before several model servers."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from halfbyte.errors import HalfbyteError
from halfbyte.serve.api_key import host_is_allowed, is_authorized
from halfbyte.serve.backends import Backends
from halfbyte.serve.decision import Decision, decide
from halfbyte.serve.event_stream import error_body
from halfbyte.serve.limits import Gate, Limits
from halfbyte.serve.relay import Outcome, Relay
from halfbyte.serve.request_facts import RequestFacts, facts_of
from halfbyte.serve.response_ids import response_id
from halfbyte.serve.router_metrics import RouterMetrics
from halfbyte.serve.routing_rules import ASKED_RULE, RoutingRules
from halfbyte.serve.status_page import page
from halfbyte.serve.sticky_conversations import StickyConversations

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
OPEN = frozenset({"/", "/health"})
"""Paths that need no key: the page holds no numbers, and health says only up or down."""
ASKED_HEADER = "x-halfbyte-precision"
CONNECT_SECONDS = 5.0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class RouterOptions:
    """How a router behaves; ``log`` receives a line per request, with the prompt only where ``log_prompts``."""

    model: str = "halfbyte"
    host: str = "127.0.0.1"
    api_key: str | None = None
    limits: Limits = field(default_factory=Limits)
    log_prompts: bool = False
    log: Callable[[str], None] = _to_stderr


class Refusal(Exception):  # noqa: N818
    """A request is answered with an error before any backend is asked."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Router:
    """Requests in, decisions, answers of backends out."""

    def __init__(self, backends: Backends, rules: RoutingRules | None, options: RouterOptions) -> None:
        self.backends, self.rules, self.options = backends, rules, options
        self.gate = Gate(options.limits.concurrent, options.limits.queue)
        self.metrics = RouterMetrics(backends, self.gate)
        self.sticky = StickyConversations()
        self._started = int(time.time())
        self._client: httpx.AsyncClient | None = None

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [Route(path, self._guarded(self._answer), methods=["POST"]) for path in ENDPOINTS]
        routes += [
            Route("/v1/models", self._guarded(self._models)),
            Route("/health", self._guarded(self._health)),
            Route("/metrics", self._guarded(self._metrics)),
            Route("/status.json", self._guarded(self._status)),
            Route("/", self._guarded(self._page)),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.options.limits.concurrent)
        # trust_env: a proxy of the environment has no place before a server on this machine
        async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as client:
            self._client = client
            yield

    def _guarded(self, handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Any:
            try:
                self._admit(request)
                return await handler(request)
            except Refusal as refusal:
                self.metrics.refused.labels(refusal.code).inc()
                kind = "authentication_error" if refusal.status == 401 else "invalid_request_error"
                # what follows a refused body on the connection is not read
                headers = {"connection": "close"} if request.method == "POST" else {}
                return JSONResponse(error_body(str(refusal), kind, refusal.code), refusal.status, headers)
            except ClientDisconnect:
                return Response(status_code=400)

        return handle

    def _admit(self, request: Request) -> None:
        if not host_is_allowed(request.headers.get("host"), self.options.host):
            raise Refusal(403, "this router answers only to names of this machine", "host_not_allowed")
        if request.url.path not in OPEN and not is_authorized(
            self.options.api_key, request.headers.get("authorization")
        ):
            raise Refusal(401, "the API key is missing or wrong", "invalid_api_key")

    async def _answer(self, request: Request) -> Relay:
        body = await self._body(request)
        path = request.url.path
        asked = self._asked(request, body)
        facts = facts_of(body)
        decision = self._decide(facts, body.get("previous_response_id"), path, asked)
        if decision.note:
            self.options.log(f"halfbyte: {decision.note}")
        candidates = self.backends.candidates(decision.precision, only=decision.rule == ASKED_RULE)
        assert self._client is not None
        finished = partial(self._finished, path, facts)
        return Relay(
            self._client,
            candidates,
            path,
            body,
            decision.precision,
            decision.rule,
            self.gate,
            self.options.limits.seconds,
            finished,
        )

    async def _body(self, request: Request) -> dict[str, Any]:
        """Read and parse the body within its limits."""
        # a web page may send other types to any address without asking it first
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the content type must be application/json", "wrong_content_type")
        try:
            raw = await asyncio.wait_for(self._read(request), self.options.limits.body_seconds)
        except asyncio.TimeoutError:
            raise Refusal(408, "the body took too long to arrive", "body_timeout") from None
        try:
            content = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is not valid JSON", "invalid_json") from None
        if not isinstance(content, dict):
            raise Refusal(400, "the body must be a JSON object", "invalid_json")
        return content

    async def _read(self, request: Request) -> bytes:
        limit = self.options.limits.body
        too_large = Refusal(413, f"the body is larger than {limit} bytes", "body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        parts, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            parts.append(chunk)
        return b"".join(parts)

    def _asked(self, request: Request, body: dict[str, Any]) -> str | None:
        """Return the precision that the client names, in the header or behind the model's name."""
        model = body.get("model", self.options.model)
        if not isinstance(model, str):
            raise Refusal(400, "`model` must be a text", "invalid_model")
        name, _, behind = model.partition("@")
        if name != self.options.model:
            known = f"{self.options.model}, alone or with @ and one of {self._names()}"
            raise Refusal(404, f"there is no model {name[:80]!r}; give {known}", "model_not_found")
        return request.headers.get(ASKED_HEADER) or behind or None

    def _decide(self, facts: RequestFacts, previous: Any, path: str, asked: str | None) -> Decision:
        known = self.sticky.get(previous if isinstance(previous, str) else facts.conversation)
        try:
            if isinstance(previous, str) and known and not asked:
                # the engine keeps the conversation, so no other one can go on with it
                return Decision(known, ASKED_RULE)
            embeddings = path.endswith("/embeddings")
            return decide(facts, self.rules, self.backends.precisions, asked, known, embeddings)
        except HalfbyteError as error:
            raise Refusal(404, str(error), "precision_not_found") from None

    def _finished(self, path: str, facts: RequestFacts, outcome: Outcome) -> None:
        if outcome.status == 200:
            self.sticky.remember(facts.conversation, outcome.precision)
            self.sticky.remember(response_id(path, outcome.head), outcome.precision)
        count = outcome.count
        self.metrics.answered(path, outcome.precision, outcome.rule, outcome.status, outcome.first, outcome.seconds)
        self.metrics.generated(outcome.precision, count.prompt, count.tokens)
        line = (
            f"{path} {outcome.status} {outcome.precision} {outcome.rule} {count.tokens} tokens {outcome.seconds:.3f} s"
        )
        self.options.log(f"{line} {outcome.problem}".rstrip())
        if self.options.log_prompts:
            self.options.log(f"prompt: {json.dumps(facts.everything)}")

    async def _models(self, request: Request) -> JSONResponse:
        names = [self.options.model, *(f"{self.options.model}@{backend.name}" for backend in self.backends)]
        data = [{"id": name, "object": "model", "created": self._started, "owned_by": "halfbyte"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    async def _health(self, request: Request) -> JSONResponse:
        up = {backend.name: backend.healthy for backend in self.backends}
        return JSONResponse(
            {"status": "ok" if any(up.values()) else "down", "models": up}, 200 if any(up.values()) else 503
        )

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _status(self, request: Request) -> JSONResponse:
        return JSONResponse({"model": self.options.model, **self.metrics.status()})

    async def _page(self, request: Request) -> HTMLResponse:
        html, policy = page()
        return HTMLResponse(html, headers={"content-security-policy": policy, "x-content-type-options": "nosniff"})

    def _names(self) -> str:
        return ", ".join(backend.name for backend in self.backends)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
