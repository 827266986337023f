"""A small OpenAI-compatible server process for details of the protocol: how it answers is in the request.

``python engine_process.py PORT NAME``. Keys of a request: ``count`` pieces, ``pause`` seconds between them, ``die``:
the piece at which the process kills itself, ``status``: an error. Its answers name it; ``/state`` tells what it saw.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

NAME = sys.argv[2]
cancelled = 0
seen: dict[str, Any] = {}


async def pieces(body: dict[str, Any]) -> AsyncIterator[bytes]:
    global cancelled
    try:
        for i in range(body.get("count", 3)):
            if body.get("die") == i:
                yield b'data: {"choices": [{"delta": {"content": "half an ev'
                await asyncio.sleep(0.1)
                os.kill(os.getpid(), signal.SIGKILL)
            await asyncio.sleep(body.get("pause", 0))
            delta = {"content": f"{body.get('mark', '')}{i} "}
            chunk = {"id": NAME, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}
            yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"
    except (asyncio.CancelledError, GeneratorExit):
        cancelled += 1
        raise


async def answer(request: Request) -> Response:
    body = await request.json()
    seen.update(body=body, headers=dict(request.headers))
    if "status" in body:
        return JSONResponse({"error": {"message": "no", "type": "x"}}, body["status"])
    if body.get("stream"):
        return StreamingResponse(pieces(body), media_type="text/event-stream", headers={"x-engine": NAME})
    await asyncio.sleep(body.get("pause", 0))
    usage = {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}
    message = {"role": "assistant", "content": f"{body.get('mark', '')}{NAME}"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return JSONResponse({"id": "resp_1", "object": "chat.completion", "created": 0, "model": body["model"],
                         "choices": [choice], "usage": usage})  # fmt: skip


async def state(request: Request) -> JSONResponse:
    return JSONResponse({"pid": os.getpid(), "cancelled": cancelled, **seen})


async def health(request: Request) -> Response:
    return Response()


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
app = Starlette(
    routes=[
        *(Route(path, answer, methods=["POST"]) for path in PATHS),
        Route("/state", state),
        Route("/health", health),
    ]
)
if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
