"""Measures an OpenAI-compatible server under load: tokens per second, time to first token, time between tokens."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from halfbyte.errors import HalfbyteError

PROMPT = "Write about the history of a city, its streets, its people and the river that runs through it."


@dataclass(frozen=True)
class LoadOptions:
    """How a server is asked: ``requests`` per stream of requests, each for ``max_tokens`` tokens."""

    model: str
    prompt: str = PROMPT
    max_tokens: int = 64
    requests: int = 2
    api_key: str = field(default="", repr=False)
    timeout: float = 600.0


@dataclass
class Answer:
    """Times of one answer in seconds: to the first token, between tokens, in all; ``tokens`` it had."""

    first: float
    between: list[float]
    seconds: float
    tokens: int


def run_load(url: str, concurrencies: list[int], options: LoadOptions) -> list[dict[str, Any]]:
    """Measure each number of concurrent requests in turn; HalfbyteError where the server fails.

    Every request has a number before its prompt, so that no answer comes from a cache of prefixes.
    """
    return asyncio.run(_run(url.rstrip("/"), concurrencies, options))


async def first_model(url: str, api_key: str) -> str:
    """Return the first model that a server lists; HalfbyteError where it lists none."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        try:
            response = await client.get(f"{url.rstrip('/')}/v1/models", headers=_headers(api_key))
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
            raise HalfbyteError(f"{url} does not list its models ({error or type(error).__name__})") from None


async def _run(url: str, concurrencies: list[int], options: LoadOptions) -> list[dict[str, Any]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(trust_env=False, timeout=options.timeout, limits=limits) as client:
        await _ask(client, url, options, 0)  # what only the first request pays for
        return [await _measure(client, url, concurrency, options) for concurrency in concurrencies]


async def _measure(client: httpx.AsyncClient, url: str, concurrency: int, options: LoadOptions) -> dict[str, Any]:
    async def stream(number: int) -> list[Answer]:
        first = 1 + number * options.requests
        return [await _ask(client, url, options, first + i) for i in range(options.requests)]

    begin = time.perf_counter()
    streams = await asyncio.gather(*(stream(number) for number in range(concurrency)))
    seconds = time.perf_counter() - begin
    answers = [answer for several in streams for answer in several]
    between = sorted(gap for answer in answers for gap in answer.between)
    firsts = sorted(answer.first for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    return {
        "concurrency": concurrency,
        "requests": len(answers),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "first_token_median": quantile(firsts, 0.5),
        "first_token_p95": quantile(firsts, 0.95),
        "between_tokens_median": quantile(between, 0.5),
        "between_tokens_p95": quantile(between, 0.95),
    }


def quantile(ordered: list[float], share: float) -> float | None:
    """Return the value that ``share`` of sorted values do not exceed, None where there is none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


async def _ask(client: httpx.AsyncClient, url: str, options: LoadOptions, number: int) -> Answer:
    body = {
        "model": options.model,
        "messages": [{"role": "user", "content": f"{number}. {options.prompt}"}],
        "max_tokens": options.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = time.perf_counter()
    times: list[float] = []
    stated = 0
    try:
        headers = _headers(options.api_key)
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                detail = (await response.aread())[:300].decode("utf-8", "replace")
                raise HalfbyteError(f"{url} answers {response.status_code}: {detail}")
            async for line in response.aiter_lines():
                content, usage = _read(line, url)
                if content:
                    times.append(time.perf_counter())
                stated = usage or stated
    except httpx.HTTPError as error:
        raise HalfbyteError(f"{url} failed under load: {error or type(error).__name__}") from None
    if not times:
        raise HalfbyteError(f"{url} answered without a token; is {options.model!r} a chat model?")
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]  # noqa: RUF007  Python 3.10
    return Answer(times[0] - begin, gaps, times[-1] - begin, stated or len(times))


def _read(line: str, url: str) -> tuple[str, int]:
    """Return the text and the stated tokens of one line of a stream."""
    if not line.startswith("data:") or line.endswith("[DONE]"):
        return "", 0
    try:
        event = json.loads(line[5:])
    except ValueError:
        raise HalfbyteError(f"{url} sent an event that is not JSON") from None
    if event.get("error"):
        raise HalfbyteError(f"{url} ended a stream with an error: {event['error'].get('message', '')}")
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return delta.get("content") or delta.get("reasoning_content") or "", (event.get("usage") or {}).get(
        "completion_tokens", 0
    )


def _headers(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}
