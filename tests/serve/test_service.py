"""``halfbyte serve`` with real engines on the bundled model: the whole way from a checkpoint to the official client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from tests.serve.running import free_port, wait_for

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.serve.decision import Precision
from halfbyte.serve.served_models import ServedModel
from halfbyte.serve.service import EngineOptions, check_address, needs_router

DEMO = Path(halfbyte.__file__).parent / "demo_model"
RULES = "default: nvfp4\nrules: [{name: coding, precision: bf16, keywords: [code]}]"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "HF_HUB_OFFLINE": "1"}


def children(pid: int) -> list[int]:
    """Processes below a process, the nearest first."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found, open_ = [], [pid]
    while open_:
        parent = open_.pop(0)
        below = [child for child, its_parent in pairs if its_parent == parent]
        found += below
        open_ += below
    return found


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "nvfp4"
    halfbyte.quantize(DEMO, out, "nvfp4", dialect="halfbyte")
    return out


@pytest.fixture(scope="module")
def two(packed: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    pytest.importorskip("transformers")
    (packed.parent / "rules.yaml").write_text(RULES)
    (packed.parent / "key").write_text("sk-test")
    port = free_port()
    options = ["--rules", "rules.yaml", "--name", "demo", "--port", str(port), "--api-key-file", "key"]
    command = [sys.executable, "-m", "halfbyte", "serve", str(packed), str(DEMO), *options, "--engine", "transformers"]
    process = subprocess.Popen(command, cwd=packed.parent, env=ENVIRONMENT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", 180)
        yield f"http://127.0.0.1:{port}", process
    finally:
        below = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 130
        assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


def test_the_official_client_chats_streams_and_is_refused(two: tuple[str, subprocess.Popen[bytes]]) -> None:
    client = openai.OpenAI(base_url=f"{two[0]}/v1", api_key="sk-test", max_retries=0)
    question = [{"role": "user", "content": "hello"}]
    raw = client.chat.completions.with_raw_response.create(model="demo", messages=question, max_tokens=4)
    assert raw.headers["x-halfbyte-precision"] == "nvfp4"
    assert raw.parse().usage.completion_tokens == 4
    chunks = list(client.chat.completions.create(model="demo@bf16", messages=question, max_tokens=4, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"
    assert client.completions.create(model="demo", prompt="The city", max_tokens=3).choices[0].text
    assert [model.id for model in client.models.list()] == ["demo", "demo@nvfp4", "demo@bf16"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{two[0]}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(model="demo", messages="no list")  # type: ignore[call-overload]


def test_a_real_engine_killed_in_mid_stream_is_an_error_and_the_next_request_works(
    two: tuple[str, subprocess.Popen[bytes]],
) -> None:
    url, process = two
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0, timeout=60)
    question = [{"role": "user", "content": "hello"}]
    engine = next(
        pid for pid in children(process.pid) if b"nvfp4\0" in command_of(pid) and b"guard" not in command_of(pid)
    )
    stream = client.chat.completions.create(model="demo", messages=question, max_tokens=400, stream=True)
    with pytest.raises(openai.APIError, match="lost in the middle of the answer"):
        for number, _ in enumerate(stream):
            if number == 2:
                os.kill(engine, signal.SIGKILL)
    raw = client.chat.completions.with_raw_response.create(model="demo", messages=question, max_tokens=2)
    assert raw.headers["x-halfbyte-precision"] == "bf16" and raw.headers["x-halfbyte-rule"] == "default; nvfp4 is down"
    end = time.monotonic() + 120
    while not httpx.get(f"{url}/health").json()["models"]["nvfp4"]:
        assert time.monotonic() < end
        time.sleep(0.5)
    raw = client.chat.completions.with_raw_response.create(model="demo", messages=question, max_tokens=2)
    assert raw.headers["x-halfbyte-precision"] == "nvfp4"


def command_of(pid: int) -> bytes:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes().replace(b" ", b"\0") if path.exists() else b""


def test_one_model_alone_is_the_engine_itself(packed: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "halfbyte", "serve", str(packed), "--port", str(port), "--engine", "transformers"]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", 180)
        assert b"transformers_server" in command_of(process.pid) and children(process.pid) == []
    finally:
        process.terminate()
        process.wait(30)


def test_a_router_stands_before_one_model_where_the_engine_cannot_do_it() -> None:
    model = ServedModel("/m", Precision("nvfp4", 4.0), "halfbyte", 1, 2)
    elsewhere = EngineOptions("transformers", "/python")
    assert needs_router([model, model], None, elsewhere, None) and needs_router([model], None, elsewhere, "key")
    assert not needs_router([model], None, elsewhere, None)
    assert not needs_router([model], None, EngineOptions("vllm", "/python"), "key")


def test_an_address_that_is_taken_or_impossible_is_refused_before_engines_start() -> None:
    check_address("127.0.0.1", free_port())
    check_address("::1", free_port())
    with socket.create_server(("127.0.0.1", 0)) as held:
        for host, port in (("127.0.0.1", held.getsockname()[1]), ("127.0.0.1", 70_000), ("192.0.2.1", 8080)):
            with pytest.raises(HalfbyteError, match=f"{host}, port {port}, cannot be listened on"):
                check_address(host, port)
