"""Values of foreign JSON by type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from halfbyte.checkpoint.config import check_config, parts_of, text_parts
from halfbyte.checkpoint.foreign import Fields, check_plain
from halfbyte.errors import CheckpointError

GETTERS: dict[str, Callable[[Fields, str], Any]] = {
    "fields": lambda fields, key: dict(fields.fields(key).values),
    "text": Fields.text,
    "flag": Fields.flag,
    "count": Fields.count,
    "number": Fields.number,
    "texts": Fields.texts,
    "objects": lambda fields, key: [dict(inner.values) for inner in fields.objects(key)],
}
VALUES: dict[str, Any] = {
    "object": {"a": 1},
    "list": [1, {}],
    "texts": ["a"],
    "objects": [{"a": 1}],
    "text": "a",
    "flag": True,
    "count": 3,
    "float": 1.5,
    "negative": -1,
    "huge": 10**400,
    "nan": float("nan"),
}
FITS = {
    "fields": {"object"},
    "text": {"text"},
    "flag": {"flag"},
    "count": {"count"},
    "number": {"count", "float", "negative"},
    "texts": {"texts"},
    "objects": {"objects"},
}


@pytest.mark.parametrize("kind", GETTERS)
@pytest.mark.parametrize("value", VALUES)
def test_a_value_has_the_type_that_is_asked_for_or_is_refused_with_its_place(kind: str, value: str) -> None:
    fields = Fields({"outer": {"key": VALUES[value]}}, "config.json").fields("outer")
    if value in FITS[kind]:
        assert GETTERS[kind](fields, "key") == VALUES[value]
    else:
        with pytest.raises(CheckpointError, match=r"outer\.key(\[0\])? in config\.json must be .*, not "):
            GETTERS[kind](fields, "key")


@pytest.mark.parametrize("kind", GETTERS)
def test_null_is_as_good_as_nothing(kind: str) -> None:
    assert GETTERS[kind](Fields({"key": None}, "f"), "key") == GETTERS[kind](Fields({}, "f"), "key")


def test_a_message_does_not_repeat_large_values() -> None:
    with pytest.raises(CheckpointError) as error:
        Fields({"k" * 1000: "v" * 10_000}, "f").count("k" * 1000)
    assert len(str(error.value)) < 400


def test_what_could_not_be_written_again_is_refused() -> None:
    deep: Any = 0
    for _ in range(100):
        deep = [deep]
    for value, reason in ((deep, "levels deep"), ({"a": ["\ud800"]}, "surrogate"), ({"\udc00": 1}, "surrogate")):
        with pytest.raises(CheckpointError, match=reason):
            check_plain(value, "config.json")
    check_plain({"a": [{"b": "\U0001f600"}]}, "config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": 5},
        {"architectures": [5]},
        {"model_type": ["llama"]},
        {"text_config": "a"},
        {"text_config": {"num_hidden_layers": "a"}},
        {"vision_config": {"inner_config": {"hidden_size": {}}}},
        {"num_experts": True},
        {"num_experts": float("inf")},
        {"tie_word_embeddings": "yes"},
        {"quantization_config": [1]},
        {"quantization_config": {"quant_method": 1}},
        {"llm_config": {"quantization_config": "a"}},
        {"auto_map": "code"},
        {"rope_scaling": 3},
    ],
)
def test_known_keys_of_a_configuration_have_known_types(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json must be"):
        check_config(config, "config.json")


def test_real_configurations_pass() -> None:
    check_config(
        {
            "architectures": ["X"],
            "num_attention_heads": [4, 8],
            "text_config": None,
            "rope_scaling": None,
            "head_dim": None,
            "initializer_range": float("inf"),
            "audio_config": "a name",
        },
        "config.json",
    )


def test_configurations_are_found_at_any_depth_those_of_text_models_first() -> None:
    config = {
        "vision_config": {"v": 1},
        "thinker_config": {"text_config": {"t": 1}, "quantization_config": {"inner_config": {}}},
    }
    assert [place for place, _ in parts_of(config)] == [
        "",
        "thinker_config",
        "vision_config",
        "thinker_config.text_config",
    ]
    assert text_parts(config) == [config, config["thinker_config"], {"t": 1}]
