"""llama.cpp's server with a file that halfbyte wrote; skipped without the wheel xllamacpp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.serve.running import free_port, wait_for

import halfbyte

SHARED_MODEL = "data/models/qwen3-tiny-wiki"


def test_a_gguf_file_is_served(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    halfbyte.quantize(shared / SHARED_MODEL, tmp_path / "out", "mxfp4", dialect="gguf")
    port = free_port()
    path = os.pathsep.join(entry for entry in sys.path if entry)
    options = ["serve", str(tmp_path / "out"), "--port", str(port), "--name", "tiny", "--router"]
    process = subprocess.Popen([sys.executable, "-m", "halfbyte", *options], env={**os.environ, "PYTHONPATH": path})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", 90)
        body = {"model": "tiny", "prompt": "The city", "max_tokens": 4}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        assert answer.headers["x-halfbyte-precision"] == "mxfp4"
    finally:
        process.terminate()
        process.wait(30)
