"""Ties that config.json does not state: transformers' configuration classes are the judge."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.models.tied import is_tied, tied_by_default


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "gemma3_text"}, True),
        ({"model_type": "gemma3_text", "tie_word_embeddings": False}, False),
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({}, False),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, True),
        # the outer class ties by default, the language model's does not
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, False),
        ({"model_type": "some_vl", "text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_config_json_decides_and_then_the_classes(config: dict[str, Any], tied: bool) -> None:
    assert is_tied(config) == tied


def test_the_defaults_are_those_of_transformers() -> None:
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    for kind in ("llama", "qwen3", "mistral", "gpt_oss", "deepseek_v3", *sorted(tied_by_default())[::9]):
        if kind in auto.CONFIG_MAPPING:
            assert auto.CONFIG_MAPPING[kind]().tie_word_embeddings == (kind in tied_by_default()), kind
