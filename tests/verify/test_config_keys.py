"""Keys that look like a known one, but are not it."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.verify.config_keys import misspelt_keys


@pytest.mark.parametrize(
    ("settings", "wrong", "right"),
    [
        ({"ignored": []}, "ignored", "ignore"),
        ({"config_groups": {"group_0": {"targest": []}}}, "targest", "targets"),
        ({"config_groups": {"group_0": {"weights": {"num_bit": 4}}}}, "num_bit", "num_bits"),
        ({"list": [{"symetric": True}]}, "symetric", "symmetric"),
        ({"quant_aglo": "NVFP4"}, "quant_aglo", "quant_algo"),
    ],
)
def test_a_misspelt_key_is_named_at_any_depth(settings: dict[str, Any], wrong: str, right: str) -> None:
    assert misspelt_keys(settings, "it") == [f"it has the key {wrong!r}, which nothing reads; it should be {right!r}"]


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fp8", "config_groups": {"group_0": {"targets": [], "weights": {"num_bits": 4}}}},
        {"config_groups": {"target": {}}},  # the name of a group
        {"quantized_layers": {"weight": {"quant_algo": "FP8"}}},  # the name of a module
        {"model.target": 1},
        {"a_key_of_its_own": 1},
        {"dynamically": True},  # too long for a slip
    ],
)
def test_known_keys_names_and_other_words_pass(settings: dict[str, Any]) -> None:
    assert misspelt_keys(settings, "it") == []


def test_more_keys_can_be_known() -> None:
    assert misspelt_keys({"ignored": []}, "it", frozenset({"ignored"})) == []
    assert misspelt_keys({"tableaux": []}, "it", frozenset({"tableau"})) == [
        "it has the key 'tableaux', which nothing reads; it should be 'tableau'"
    ]
