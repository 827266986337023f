"""Events on their way through."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from halfbyte.serve.event_stream import LONGEST, EventSplitter, TokenCount, error_event

STREAM = b'data: {"a": 1}\n\ndata: {"b": 2}\r\n\r\n: ping\n\ndata: [DONE]\n\n'


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_however_a_stream_is_cut_it_arrives_whole_and_in_whole_events(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    splitter = EventSplitter()
    passed = [splitter.feed(STREAM[a:b]) for a, b in pairwise(places)]
    assert b"".join(passed) + splitter.rest() == STREAM
    assert all(not part or part.endswith((b"\n\n", b"\r\n\r\n")) for part in passed)


def test_a_stream_without_blank_lines_is_not_held_back_for_ever() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"x" * LONGEST) == b"" and len(splitter.feed(b"y")) == LONGEST + 1


def test_tokens_come_from_usage_or_from_events() -> None:
    count = TokenCount()
    count.see_events(b'data: {"x": 1}\n\ndata: {"x": 2}\n\ndata: [DONE]\n\n')
    assert (count.tokens, count.prompt) == (2, 0)
    count.see_events(b'data: {"x": "data: data: [DONE]"}\r\n\r\n')
    assert count.tokens == 3
    count.see_events(b'data: {"usage": {"prompt_tokens": 3, "completion_tokens": 9}}\n\n')
    assert (count.tokens, count.prompt) == (9, 3)
    count.see_events(b'data: {"response": {"usage":{"input_tokens": 4, "output_tokens": 8}}}\n\n')
    assert (count.tokens, count.prompt) == (8, 4)
    count.see_body(b"not JSON")
    assert count.tokens == 8


def test_error_events_are_those_of_their_endpoint() -> None:
    chat = error_event("/v1/chat/completions", 'lost "it"', "backend_lost").split(b"\n\n")
    assert json.loads(chat[0][6:])["error"]["message"] == 'lost "it"' and chat[1] == b"data: [DONE]"
    kind, data, *_ = error_event("/v1/responses", "lost", "backend_lost").split(b"\n")
    assert kind == b"event: error" and json.loads(data[6:])["type"] == "error"
