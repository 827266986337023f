"""Ids of stored responses."""

from __future__ import annotations

from halfbyte.serve.response_ids import response_id


def test_only_responses_have_an_id_that_is_gone_on_with() -> None:
    head = b'event: response.created\ndata: {"response": {"id": "resp_a-1", "x": 1}}'
    assert response_id("/v1/responses", head) == "resp_a-1"
    assert response_id("/v1/chat/completions", head) == "" == response_id("/v1/responses", b'{"id": "chatcmpl-1"}')
