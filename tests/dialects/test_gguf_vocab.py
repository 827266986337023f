"""Tokenizers in GGUF: which pre-tokenizer llama.cpp is told, types and scores of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dialects.gguf_models import SPLIT, checkpoint, tokenizer
from halfbyte.checkpoint.foreign import Fields
from halfbyte.dialects.gguf_vocab import pre_tokenizer
from halfbyte.errors import PlanError
from small_models import linear, run

gguf = pytest.importorskip("gguf")

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def metadata(folder: Path) -> dict[str, Any]:
    path = next(folder.glob("*.gguf"))
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "gpt-4o", "tekken"])
def test_the_regular_expression_names_the_pre_tokenizer(name: str) -> None:
    assert pre_tokenizer(Fields(tokenizer(name), "here"), "here") == name


def test_llama_3_rules_without_whole_words_have_another_name() -> None:
    table = tokenizer("llama-bpe")
    table["model"]["ignore_merges"] = False
    assert pre_tokenizer(Fields(table, "here"), "here") == "smaug-bpe"


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
    ],
)
def test_byte_level_splitting_of_gpt_2(steps: list[dict[str, Any]], name: str) -> None:
    table = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {}}
    assert pre_tokenizer(Fields(table, "here"), "here") == name


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [{"type": "Whitespace"}],
        [
            {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False},
        ],
        [{"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}],
    ],
)
def test_other_pre_tokenizers_are_refused(steps: list[dict[str, Any]]) -> None:
    with pytest.raises(PlanError, match="splits text in a way that is not known"):
        pre_tokenizer(Fields({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}, "here"), "here")


def test_tokens_beyond_the_tokenizer_are_padded(tmp_path: Path) -> None:
    run(checkpoint(tmp_path / "m", "qwen3"), tmp_path / "out", linear("mxfp4"), "gguf")
    found = metadata(tmp_path / "out")
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    kinds = gguf.TokenType
    assert (tokens[257], types[257]) == ("the", kinds.NORMAL)
    assert (tokens[258], types[258]) == ("<|end|>", kinds.CONTROL)
    assert (tokens[259], types[259]) == ("<tool>", kinds.USER_DEFINED)
    assert (tokens[300], types[300]) == ("[PAD300]", kinds.UNUSED)
    assert found["tokenizer.ggml.merges"] == ["h e", "t he"]
    assert found["tokenizer.ggml.eos_token_id"] == 258
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ x }}"


@pytest.mark.parametrize("model", SPLIT)
def test_every_model_states_its_pre_tokenizer(model: str, tmp_path: Path) -> None:
    run(checkpoint(tmp_path / "m", model), tmp_path / "out", linear("mxfp4"), "gguf")
    assert metadata(tmp_path / "out")["tokenizer.ggml.pre"] == SPLIT[model]


def test_sentencepiece_scores_are_the_ranks_of_merges(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "models" / "stories260K"
    run(source, tmp_path / "out", linear("mxfp4", if_not_divisible="keep"), "gguf")
    found = metadata(tmp_path / "out")
    assert found["tokenizer.ggml.model"] == "llama"
    tokens, scores = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]
    merges = json.loads((source / "tokenizer.json").read_text())["model"]["merges"]
    first = "".join(merges[0])
    assert scores[tokens.index(first)] == 0
    assert scores[tokens.index("".join(merges[100]))] == -100
    assert found["tokenizer.ggml.token_type"][:4] == [
        gguf.TokenType.UNKNOWN,
        gguf.TokenType.CONTROL,
        gguf.TokenType.CONTROL,
        gguf.TokenType.BYTE,
    ]
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "WordPiece", "vocab": {}}}', '{"model": {}}'])
def test_other_tokenizers_are_refused(content: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", "qwen3")
    (source / "tokenizer.json").write_text(content)
    with pytest.raises(PlanError, match="BPE"):
        run(source, tmp_path / "out", linear("mxfp4"), "gguf")
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", "qwen3")
    table = tokenizer()
    table["model"]["vocab"]["beyond"] = 320
    (source / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(PlanError, match=r"more tokens than the embedding has rows \(320\)"):
        run(source, tmp_path / "out", linear("mxfp4"), "gguf")
