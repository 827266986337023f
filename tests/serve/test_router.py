"""The router before small server processes: what passes, what is refused, what is logged."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from tests.serve.running import Served, served

from halfbyte.serve.limits import Limits
from halfbyte.serve.router import RouterOptions

SECRET = "sk-serve-test-key"


@pytest.fixture(scope="module")
def router() -> Iterator[Served]:
    with served("w4", "w16") as running:
        yield running


@pytest.fixture(scope="module")
def guarded() -> Iterator[Served]:
    limits = Limits(body=10_000, body_seconds=1, seconds=2, concurrent=2, queue=1)
    with served("w4", options=RouterOptions(api_key=SECRET, limits=limits)) as running:
        yield running


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def raw(port: int, data: bytes, seconds: float = 10) -> bytes:
    """Send bytes, close this side for writing, and read the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        parts = []
        try:
            while part := connection.recv(65536):
                parts.append(part)
        except OSError:
            pass
    return b"".join(parts)


def test_rules_choose_and_the_headers_say_so(router: Served) -> None:
    plain, code = router.post(), router.post(messages=[{"role": "user", "content": "fix my code"}])
    for answer, precision, rule in ((plain, "w4", "default"), (code, "w16", "coding")):
        assert answer.headers["x-halfbyte-precision"] == precision and answer.headers["x-halfbyte-rule"] == rule
        assert answer.json()["choices"][0]["message"]["content"] == precision


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"])
def test_every_endpoint_passes_all_keys_but_the_model(router: Served, path: str) -> None:
    keys = {"tools": [{"type": "function"}], "logprobs": True, "n": 2, "stop": ["x"], "temperature": 0.25}
    assert router.post(path, **keys).status_code == 200
    name = "w16" if path.endswith("embeddings") else "w4"
    body = router.state(name)["body"]
    assert body.pop("model") == f"model-of-{name}"
    assert body == {**keys, "messages": [{"role": "user", "content": "hello"}]}


def test_a_stream_passes_byte_for_byte(router: Served) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "count": 50, "mark": "é☃"}
    direct = httpx.post(f"{router.router.backends['w4'].url}/v1/chat/completions", json=body, trust_env=False)
    through = router.post(**body)
    assert through.content == direct.content and through.headers["x-engine"] == "w4"


def test_a_client_may_name_the_precision(router: Served) -> None:
    by_model = router.post(model="halfbyte@w16")
    by_header = router.post(headers={"x-halfbyte-precision": "16bit"})
    assert [r.headers["x-halfbyte-precision"] for r in (by_model, by_header)] == ["w16", "w16"]
    assert by_model.headers["x-halfbyte-rule"] == "asked-for"
    assert error(router.post(model="halfbyte@int3")) == (404, "precision_not_found")
    assert error(router.post(model="gpt-5")) == (404, "model_not_found")
    assert error(router.post(model=5)) == (400, "invalid_model")


def test_a_conversation_that_was_escalated_stays(router: Served) -> None:
    first = [{"role": "user", "content": "look at this code"}, {"role": "assistant", "content": "ok"}]
    router.post(messages=first[:1])
    time.sleep(0.1)  # the router remembers after the answer has left
    answer = router.post(messages=[*first, {"role": "user", "content": "thanks"}])
    assert (answer.headers["x-halfbyte-precision"], answer.headers["x-halfbyte-rule"]) == ("w16", "default")


def test_a_response_goes_on_where_its_predecessor_was(router: Served) -> None:
    router.post("/v1/responses", model="halfbyte@w16", input="hello")
    time.sleep(0.1)
    answer = router.post("/v1/responses", input="more", previous_response_id="resp_1")
    assert answer.headers["x-halfbyte-precision"] == "w16"


def test_models_health_metrics_and_page(router: Served) -> None:
    names = [model["id"] for model in httpx.get(f"{router.url}/v1/models").json()["data"]]
    assert names == ["halfbyte", "halfbyte@w4", "halfbyte@w16"]
    assert httpx.get(f"{router.url}/health").json() == {"status": "ok", "models": {"w4": True, "w16": True}}
    assert 'halfbyte_backend_up{precision="w4"} 1.0' in httpx.get(f"{router.url}/metrics").text
    assert "default-src 'none'" in httpx.get(f"{router.url}/").headers["content-security-policy"]


def test_an_engines_error_reaches_the_client_as_it_is(router: Served) -> None:
    answer = router.post(status=422)
    assert (answer.status_code, answer.json()) == (422, {"error": {"message": "no", "type": "x"}})


def test_logs_hold_no_prompt_unless_asked(router: Served) -> None:
    router.post(messages=[{"role": "user", "content": "my secret plan"}])
    time.sleep(0.1)
    assert router.log and not any("secret" in line for line in router.log)
    assert router.log[-1].startswith("/v1/chat/completions 200 w4 default 5 tokens")


def test_prompts_are_logged_where_that_is_asked_for() -> None:
    with served("w4", options=RouterOptions(log_prompts=True)) as running:
        running.post(messages=[{"role": "user", "content": "line\nbreak"}])
        time.sleep(0.1)
        assert running.log[-1] == 'prompt: "line\\nbreak"'


def test_a_client_that_leaves_ends_the_request_to_the_engine(router: Served) -> None:
    before = router.state("w4")["cancelled"]
    body = {"messages": [], "stream": True, "count": 1000, "pause": 0.05}
    with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=body, trust_env=False) as answer:
        next(answer.iter_raw())
    end = time.monotonic() + 10
    while router.state("w4")["cancelled"] == before:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_slow_reader_gets_the_whole_stream(router: Served) -> None:
    body = {"messages": [], "stream": True, "count": 3000}
    with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=body, trust_env=False, timeout=30) as answer:
        parts = []
        for i, part in enumerate(answer.iter_raw(4096)):
            parts.append(part)
            if i < 20:
                time.sleep(0.02)
    numbers = [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines(b"".join(parts))]
    assert numbers == [f"{i} " for i in range(3000)]


def lines(stream: bytes) -> list[bytes]:
    return [line for line in stream.splitlines() if line.startswith(b"data: {")]


def test_concurrent_streams_do_not_mix(router: Served) -> None:
    texts: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        answer = router.post(stream=True, count=60, pause=0.005, mark=f"{number}:")
        texts[number] = [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines(answer.content)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: [f"{number}:{i} " for i in range(60)] for number in range(24)}


def test_the_key_is_asked_for_everywhere_but_page_and_health(guarded: Served) -> None:
    for header in (None, "Bearer wrong", SECRET, f"Basic {SECRET}", "Bearer é"):
        headers = {b"authorization": header.encode("utf-8")} if header else {}
        answer = httpx.get(f"{guarded.url}/v1/models", headers=headers, trust_env=False)  # type: ignore[arg-type]
        assert error(answer) == (401, "invalid_api_key")
    assert error(guarded.post()) == (401, "invalid_api_key")
    assert [httpx.get(f"{guarded.url}{path}").status_code for path in ("/metrics", "/status.json")] == [401, 401]
    assert [httpx.get(f"{guarded.url}{path}").status_code for path in ("/", "/health")] == [200, 200]
    assert guarded.post(headers={"authorization": f"Bearer {SECRET}"}).status_code == 200
    assert "authorization" not in guarded.state("w4")["headers"]


KEY = {"authorization": f"Bearer {SECRET}"}


def test_too_large_bodies_are_refused_before_and_while_they_are_read(guarded: Served) -> None:
    assert error(guarded.post(headers=KEY, pad="x" * 20_000)) == (413, "body_too_large")
    headers = {**KEY, "content-type": "application/json"}
    parts = (b"x" * 1000 for _ in range(30))
    answer = httpx.post(f"{guarded.url}/v1/completions", content=parts, headers=headers, trust_env=False)
    assert error(answer) == (413, "body_too_large")


def test_a_body_that_never_ends_and_an_engine_that_is_slow_run_into_limits(guarded: Served) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {SECRET}\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
        connection.sendall(f"{head}content-type: application/json\r\ncontent-length: 99\r\n\r\n{{".encode())
        assert b" 408 " in connection.recv(65536)
    assert error(guarded.post(headers=KEY, pause=5)) == (504, "timeout")
    stream = guarded.post(headers=KEY, stream=True, count=100, pause=0.1)
    assert stream.status_code == 200 and b'"code": "timeout"' in stream.content.splitlines()[-4]


def test_more_requests_than_run_and_wait_are_turned_away(guarded: Served) -> None:
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(guarded.post(headers=KEY, pause=0.7).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * 3 + [429] * 5
    assert guarded.post(headers=KEY).status_code == 200


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"{", "invalid_json"), (b"[]", "invalid_json"), (b'"x"', "invalid_json"), (b"\xff\xfe", "invalid_json"),
     (b'{"temperature": NaN}', "invalid_json"), (b"[" * 100_000, "invalid_json"), (b"", "invalid_json")],
)  # fmt: skip
def test_bad_bodies_are_an_error_of_the_client(router: Served, content: bytes, code: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{router.url}/v1/chat/completions", content=content, headers=headers, trust_env=False)
    assert error(answer) == (400, code)


def test_web_pages_of_others_get_nothing(router: Served) -> None:
    plain = httpx.post(f"{router.url}/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert error(plain) == (415, "wrong_content_type")
    rebound = httpx.get(f"{router.url}/v1/models", headers={"host": "evil.example"})
    assert error(rebound) == (403, "host_not_allowed")


def test_header_injection_finds_no_way(router: Served) -> None:
    answer = router.post(model="halfbyte@w4\r\nx-evil: 1")
    assert error(answer) == (404, "precision_not_found") and "x-evil" not in answer.headers
    request = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-halfbyte-precision: w4\nx-evil: 1\r\n\r\n"
    assert b"x-evil" not in raw(router.port, request)


def test_half_closed_and_malformed_connections_leave_the_router_well(router: Served) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    whole = head + b"content-length: %d\r\n\r\n" % len(body) + body
    source = random.Random(5)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(source.randint(1, 6)):
            place = source.randrange(len(data))
            data[place : place + source.randint(0, 3)] = source.randbytes(source.randint(0, 3))
        answer = raw(router.port, bytes(data[: source.randint(1, len(data))]), 5)
        assert not answer or (answer.startswith(b"HTTP/1.1 ") and b" 500 " not in answer[:16]), bytes(data)
    assert router.post().status_code == 200
