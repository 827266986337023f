"""config.json: what is refused, and the configurations inside of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint.config import check_config, parts_of, read_config, text_parts
from halfbyte.checkpoint.store import LocalStore
from halfbyte.errors import CheckpointError


def test_a_folder_without_a_configuration_has_an_empty_one(tmp_path: Path) -> None:
    assert read_config(LocalStore(tmp_path)) == {}


def test_a_dangling_link_is_not_taken_for_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("none")
    with pytest.raises(CheckpointError):
        read_config(LocalStore(tmp_path))


def test_infinity_is_read_as_models_write_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_config(LocalStore(tmp_path)) == {"time_step_limit": [0.0, float("inf")]}


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"architectures": "A"}, "architectures"),
        ({"model_type": 3}, "model_type"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"head_dim": True}, "head_dim"),
        ({"intermediate_size": [64, "64"]}, "intermediate_size"),
        ({"text_config": {"num_experts": {}}}, "num_experts"),
        ({"quantization_config": []}, "quantization_config"),
        ({"quantization": {"quant_method": 4}}, "quant_method"),
        ({"vision_config": "none"}, "vision_config"),
    ],
)
def test_known_keys_with_values_of_wrong_types_are_named(config: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        check_config(config, "config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"intermediate_size": [64, 128, None], "hidden_size": None, "head_dim": 64, "num_experts": 8.0},
        {"quantization_config": {"quant_method": "fp8"}, "text_config": {"hidden_size": 64}},
        json.loads('{"anything": {"else": ["may", {"be": null}]}}'),
    ],
)
def test_other_values_pass(config: dict[str, Any]) -> None:
    check_config(config, "config.json")


NESTED: dict[str, Any] = {
    "vision_config": {"a": 1, "quantization_config": {"b": 2}},
    "quantization_config": {"inner_config": {}},
    "thinker_config": {"text_config": {"c": 3}, "audio_config": {}},
    "other": {"text_config": {}},
}


def test_configurations_inside_come_level_by_level_and_text_models_first() -> None:
    assert [place for place, _ in parts_of(NESTED)] == [
        "",
        "thinker_config",
        "vision_config",
        "thinker_config.text_config",
        "thinker_config.audio_config",
    ]
    assert [place for place, _ in parts_of({"text_config": {}}, "it")] == ["it", "it.text_config"]


def test_the_language_model_is_found_below_what_surrounds_it() -> None:
    assert text_parts(NESTED) == [NESTED, NESTED["thinker_config"], {"c": 3}]
