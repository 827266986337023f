"""Decisions for a file of prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.serve.decision import Precision
from halfbyte.serve.explain import explain
from halfbyte.serve.routing_rules import parse_rules

BOTH = [Precision("w4", 4.0), Precision("w16", 16.0)]
RULES = parse_rules(
    """
default: w16
rules:
  - {name: chat, precision: w4, keywords: [hello], measured: {w4: {kl: 0.02, prompts: 9}}}
""",
    "rules",
)


def test_every_request_gets_its_decision_cost_and_loss(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"hello"\n\n' + json.dumps({"messages": [{"role": "user", "content": "code"}]}))
    document = explain(path, RULES, BOTH)
    assert document["decisions"] == [
        {"precision": "w4", "rule": "chat", "cost": 0.25, "kl": 0.02},
        {"precision": "w16", "rule": "default", "cost": 1.0, "kl": None},
    ]
    assert (document["mean_cost"], document["mean_kl"], document["measured"]) == (0.625, 0.02, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "line 1 is not valid JSON"), (b"5", "line 1 must be an object"), (b"", "holds no"), (b"\xff", "not UTF-8")],
)
def test_wrong_files_are_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(HalfbyteError, match=words):
        explain(path, RULES, BOTH)
    with pytest.raises(HalfbyteError, match="cannot be read: No such file"):
        explain(tmp_path / "none", RULES, BOTH)
