"""Which engine serves a model, and its command."""

from __future__ import annotations

import sys

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.serve.decision import Precision
from halfbyte.serve.engine_commands import ENGINES, asks_for_key, choose_engine, launch_of
from halfbyte.serve.served_models import ServedModel


def model(dialect: str | None) -> ServedModel:
    return ServedModel("/m", Precision("p", 4.0), dialect, 1, 2)


@pytest.mark.parametrize(
    ("dialect", "installed", "engine"),
    [
        ("halfbyte", {"vllm", "transformers"}, "vllm"),
        ("halfbyte", {"transformers"}, "transformers"),
        (None, {"transformers", "mlx"}, "transformers"),
        ("gguf", {"vllm", "llamacpp"}, "llamacpp"),
        ("mlx", {"vllm", "mlx"}, "mlx"),
    ],
)
def test_the_dialect_then_what_is_installed_decides(dialect: str | None, installed: set[str], engine: str) -> None:
    assert choose_engine(model(dialect), installed=installed.__contains__) == engine


@pytest.mark.parametrize(
    ("dialect", "asked", "words"),
    [
        ("gguf", "auto", "no engine for /m is installed: pip install xllamacpp"),
        ("halfbyte", "auto", "pip install 'halfbyte"),
        ("gguf", "vllm", "vllm does not load the dialect gguf"),
        ("halfbyte", "mlx", "mlx does not load the dialect halfbyte"),
        (None, "llamacpp", "llamacpp does not load unquantized folders"),
        ("halfbyte", "vllm", "the engine vllm is not installed here: pip install vllm"),
    ],
)
def test_an_engine_that_cannot_serve_it_is_refused(dialect: str | None, asked: str, words: str) -> None:
    with pytest.raises(HalfbyteError, match=words):
        choose_engine(model(dialect), asked, installed=lambda engine: False)


def test_an_engine_of_another_environment_is_not_looked_for_here() -> None:
    assert choose_engine(model("halfbyte"), "vllm", elsewhere=True, installed=lambda engine: False) == "vllm"
    launch = launch_of(model("halfbyte"), "vllm", "127.0.0.1", 5, "name", "key", "/other/python", ("--x", "1"))
    start = (
        "/other/python",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        "/m",
        "--host",
        "127.0.0.1",
        "--port",
        "5",
    )
    assert launch.command == (*start, "--served-model-name", "name", "--x", "1")


@pytest.mark.parametrize("engine", ENGINES)
def test_keys_are_in_the_environment_and_never_in_the_command(engine: str) -> None:
    launch = launch_of(model(None), engine, "127.0.0.1", 5, "name", "secret-key", sys.executable)
    assert not any("secret-key" in word for word in launch.command) and "5" in launch.command
    assert ("secret-key" in launch.environment.values()) is asks_for_key(engine)
