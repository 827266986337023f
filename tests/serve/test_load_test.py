"""Measuring a server."""

from __future__ import annotations

import asyncio

import pytest
from tests.serve.running import free_port, served

from halfbyte.errors import HalfbyteError
from halfbyte.serve.load_test import LoadOptions, first_model, quantile, run_load
from halfbyte.serve.router import RouterOptions


def test_every_concurrency_is_measured_with_the_servers_first_model() -> None:
    with served("w4", options=RouterOptions(api_key="key")) as running:
        assert asyncio.run(first_model(running.url, "key")) == "halfbyte"
        results = run_load(running.url, [1, 3], LoadOptions("halfbyte", requests=2, api_key="key"))
        assert [(r["concurrency"], r["requests"], r["tokens"]) for r in results] == [(1, 2, 6), (3, 6, 18)]
        for r in results:
            assert 0 < r["first_token_median"] <= r["first_token_p95"] < r["seconds"]
            assert r["between_tokens_median"] <= r["between_tokens_p95"]
        with pytest.raises(HalfbyteError, match="answers 404"):
            run_load(running.url, [1], LoadOptions("other", api_key="key"))
        with pytest.raises(HalfbyteError, match="does not list its models"):
            asyncio.run(first_model(running.url, "wrong"))


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(HalfbyteError, match="failed under load"):
        run_load(f"http://127.0.0.1:{free_port()}", [1], LoadOptions("m"))


def test_quantiles() -> None:
    assert quantile([], 0.5) is None and quantile([1.0, 2.0, 3.0], 0.5) == 2.0 and quantile([1.0, 2.0], 0.95) == 2.0
