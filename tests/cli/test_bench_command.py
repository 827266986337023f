"""``halfbyte bench serve``."""

from __future__ import annotations

import json

import pytest
from tests.serve.running import free_port, served

from halfbyte.cli import main


def test_a_server_is_measured_as_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with served("w4") as running:
        options = ["bench", "serve", running.url, "--concurrency", "1", "2", "--requests", "1"]
        assert main(options) == 0
        assert "tokens/s" in capsys.readouterr().out
        assert main([*options, "--json"]) == 0
        assert [r["concurrency"] for r in json.loads(capsys.readouterr().out)["results"]] == [1, 2]


def test_a_wrong_address_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", f"http://127.0.0.1:{free_port()}"]) == 2
    assert "does not list its models" in capsys.readouterr().err
