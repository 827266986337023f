from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import evaluate
from halfbyte.evaluate.conversations import conversations_of, read_conversations
from halfbyte.runtime import load_tokenizer
from small_models import linear, run


@pytest.fixture(scope="module")
def model(shared: Path) -> Path:
    return shared / "data/models/qwen3-tiny-wiki"


@pytest.fixture(scope="module")
def chats(shared: Path) -> Path:
    return shared / "data/text/chat/sharegpt_style_190.json"


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_conversations_go_through_the_chat_template_and_are_cut(model: Path, chats: Path) -> None:
    tokenizer = load_tokenizer(model)
    passage = conversations_of(chats, tokenizer, "float32")
    about = passage.protocol
    assert (about.windows, about.length, about.kind) == (100, 256, "conversations")
    assert about.tokens == 100 * 255 == sum(w.stop - w.scored for w in passage.windows)
    first = next(m for m in read_conversations(chats) if m)
    text = tokenizer.decode(passage.tokens[:256])
    assert text.startswith("<|im_start|>user") and first[0]["content"][:40] in text


def test_what_is_skipped_is_counted(model: Path, tmp_path: Path) -> None:
    long = {"from": "human", "value": "word " * 100}
    content = [
        {"conversations": [{"from": "human", "value": "hi"}]},
        {"conversations": [{"from": "alien", "value": "x"}]},
        {"text": "x"},
        {"messages": [{"role": "user", "content": "word " * 100}]},
        {"conversations": [long]},
        {"conversations": [long]},
    ]
    passage = conversations_of(write(tmp_path / "c.json", content), load_tokenizer(model), "float32", 2, 64)
    assert passage.protocol.skipped == {"too short": 1, "of an unknown form": 2}
    assert len(passage.windows) == 2 and "skipped: 1 too short" in str(passage.protocol)


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "JSON list"), ([], "no conversation"), ([1, {"conversations": []}], "no conversation")],
)
def test_files_without_conversations_are_refused(content: Any, message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match=message):
        conversations_of(write(tmp_path / "c.json", content), load_tokenizer(model), "float32")


def test_conversations_that_are_all_too_short_are_refused(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", [{"conversations": [{"from": "human", "value": "hi"}]}])
    with pytest.raises(HalfbyteError, match="1 too short"):
        conversations_of(path, load_tokenizer(model), "float32")


def test_a_tokenizer_without_a_chat_template_is_refused(shared: Path, chats: Path) -> None:
    with pytest.raises(HalfbyteError, match="no chat template"):
        conversations_of(chats, load_tokenizer(shared / "data/models/tiny1m"), "float32")


@pytest.mark.slow
def test_divergence_is_measured_on_conversations_and_perplexity_on_the_text(
    model: Path, chats: Path, shared: Path, tmp_path: Path
) -> None:
    run(model, tmp_path / "out", linear("nvfp4"))
    more: dict[str, Any] = {"conversations": chats, "conversation_count": 6, "conversation_length": 64}
    source, row = evaluate(
        tmp_path / "out", model, shared / "data/text/enwiki2015/valid.txt", length=64, max_tokens=512, **more
    )
    assert (row["protocol"]["kind"], row["kl_protocol"]["kind"]) == ("text", "conversations")
    assert row["kl_protocol"]["tokens"] == 6 * 63 and row["tokens"] == 512 - 8
    assert source["kl"]["mean"] == 0 < row["kl"]["mean"] < 0.05
    (only,) = (r for r in evaluate(tmp_path / "out", model, **more) if r["name"] == "out")
    assert only["kl"] == row["kl"] and only["perplexity"] is None


def test_conversations_need_a_source(model: Path, chats: Path) -> None:
    with pytest.raises(HalfbyteError, match="--against"):
        evaluate(model, conversations=chats)
