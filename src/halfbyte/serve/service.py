"""``halfbyte serve`` put together: models, engines, rules, router; or one engine alone in this process's place."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import uvicorn

from halfbyte.checkpoint.files import reason
from halfbyte.errors import HalfbyteError
from halfbyte.serve.api_key import is_loopback
from halfbyte.serve.backends import Backend, Backends
from halfbyte.serve.decision import check_rules
from halfbyte.serve.engine_commands import Launch, asks_for_key, choose_engine, launch_of
from halfbyte.serve.router import Router, RouterOptions
from halfbyte.serve.routing_rules import RoutingRules
from halfbyte.serve.served_models import ServedModel, memory_note
from halfbyte.serve.supervisor import Supervisor

GRACEFUL = 5
"""Seconds that open streams have after a signal to end."""


@dataclass(frozen=True)
class EngineOptions:
    """Which engine to start, with which Python, and arguments that are passed to it as they are."""

    engine: str = "auto"
    python: str = ""
    arguments: tuple[str, ...] = ()


def run_alone(model: ServedModel, options: EngineOptions, name: str, host: str, port: int, api_key: str | None) -> None:
    """Become the engine's own server; nothing of ours stays in between. Never returns."""
    engine = choose_engine(model, options.engine, bool(options.python))
    python = options.python or sys.executable
    launch = launch_of(model, engine, host, port, name, api_key or "", python, options.arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(launch.command[0], launch.command, {**os.environ, **launch.environment})
    except OSError as error:
        raise HalfbyteError(f"{launch.command[0]} cannot be started: {error.strerror}") from None


def needs_router(
    models: list[ServedModel], rules: RoutingRules | None, options: EngineOptions, key: str | None
) -> bool:
    """Whether an engine alone cannot do what is asked for."""
    if len(models) > 1 or rules is not None:
        return True
    return key is not None and not asks_for_key(choose_engine(models[0], options.engine, bool(options.python)))


def starts_of(
    models: list[ServedModel], options: EngineOptions, name: str
) -> list[tuple[Backend, Callable[[int], Launch]]]:
    """Return a backend for each model, and how to start it on a port; keys keep other users of the machine out."""
    starts: list[tuple[Backend, Callable[[int], Launch]]] = []
    for model in models:
        engine = choose_engine(model, options.engine, bool(options.python))
        key = secrets.token_urlsafe(32) if asks_for_key(engine) else ""
        backend = Backend(model.precision, "", name, engine, key, nbytes=model.nbytes, dense_nbytes=model.dense_nbytes)
        python = options.python or sys.executable
        starts.append((backend, partial(_launch, model, engine, name, key, python, options.arguments)))
    return starts


def run_router(
    models: list[ServedModel], rules: RoutingRules | None, engines: EngineOptions, options: RouterOptions, port: int
) -> None:
    """Start the engines, then the router, and serve until a signal ends this process."""
    check_address(options.host, port)
    if rules is not None:
        check_rules(rules, [model.precision for model in models])
    if len(models) > 1:
        options.log(f"halfbyte: {memory_note(models)}")
    if not is_loopback(options.host) and options.api_key is None:
        options.log(f"halfbyte: anyone who reaches {options.host} may use this server; --api-key-file asks for a key")
    starts = starts_of(models, engines, options.model)
    asyncio.run(_serve(starts, Router(Backends([backend for backend, _ in starts]), rules, options), port))


def check_address(host: str, port: int) -> None:
    """Raise HalfbyteError for an address that cannot be listened on: engines take minutes before the router does."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise HalfbyteError(
            f"{host}, port {port}, cannot be listened on ({reason(error)}); give another --host or --port"
        ) from None


async def _serve(starts: list[tuple[Backend, Callable[[int], Launch]]], router: Router, port: int) -> None:
    log = router.options.log
    supervisor = Supervisor(starts, lambda line: log(f"halfbyte: {line}"))
    watching: asyncio.Task[None] | None = None
    try:
        log(f"halfbyte: starting {', '.join(f'{backend.name} ({backend.engine})' for backend, _ in starts)}")
        await supervisor.start()
        watching = asyncio.ensure_future(supervisor.watch())
        config = uvicorn.Config(
            router.app(),
            host=router.options.host,
            port=port,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACEFUL,
        )
        shown = f"[{router.options.host}]" if ":" in router.options.host else router.options.host
        log(f"halfbyte: http://{shown}:{port}/v1 (model {router.options.model}), status on http://{shown}:{port}/")
        await uvicorn.Server(config).serve()
    finally:
        if watching:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        await supervisor.stop()


def _launch(
    model: ServedModel, engine: str, name: str, key: str, python: str, extra: tuple[str, ...], port: int
) -> Launch:
    return launch_of(model, engine, "127.0.0.1", port, name, key, python, extra)
