"""Backends that are down or die: the next one answers, or the client gets a proper error."""

from __future__ import annotations

import json

import openai
import pytest
from tests.serve.running import free_port, served

from halfbyte.serve.backends import Backend
from halfbyte.serve.decision import Precision


def test_a_backend_that_is_down_escalates_to_the_next() -> None:
    dead = Backend(Precision("w8", 8.0), f"http://127.0.0.1:{free_port()}", "m")
    with served("w4", "w16", backends=[dead]) as running:
        running.processes["w4"].kill()
        running.processes["w4"].wait()
        answer = running.post()
        assert answer.json()["choices"][0]["message"]["content"] == "w16"
        assert answer.headers["x-halfbyte-rule"] == "default; w4 is down"
        asked = running.post(model="halfbyte@w4")  # what was asked for by name is not replaced
        assert (asked.status_code, asked.json()["error"]["code"]) == (502, "backend_lost")
        running.processes["w16"].kill()
        running.processes["w16"].wait()
        assert running.post().status_code == 502


def test_a_backend_that_says_it_is_not_ready_is_passed_over() -> None:
    with served("w4", "w16") as running:
        assert running.post(status=503).status_code == 502  # of both
        running.router.backends["w4"].healthy = False
        assert running.post().headers["x-halfbyte-precision"] == "w16"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_backend_killed_in_mid_stream_ends_with_an_error_event(path: str) -> None:
    with served("w4", "w16") as running:
        answer = running.post(path, stream=True, count=10, die=3)
        lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
        events = [json.loads(line[6:]) for line in lines]  # no half event among them
        assert [event["choices"][0]["delta"]["content"] for event in events[:3]] == ["0 ", "1 ", "2 "]
        last = events[3] if path.endswith("responses") else events[3]["error"]
        assert last["code"] == "backend_lost" and len(events) == 4
        assert running.post(path).headers["x-halfbyte-precision"] == "w16"


def test_the_official_client_raises_for_a_broken_stream_and_goes_on() -> None:
    with served("w4", "w16") as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        words = []
        with pytest.raises(openai.APIError, match="lost in the middle of the answer"):
            for chunk in client.chat.completions.create(
                model="halfbyte", messages=[{"role": "user", "content": "hi"}], stream=True, extra_body={"die": 2}
            ):
                words.append(chunk.choices[0].delta.content)
        assert words == ["0 ", "1 "]
        again = client.chat.completions.create(model="halfbyte", messages=[{"role": "user", "content": "hi"}])
        assert again.choices[0].message.content == "w16" and again.usage and again.usage.total_tokens == 7
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=[])
