from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.dialects.module_patterns import compact, spaces
from halfbyte.models import Piece, Weight


def matches(patterns: list[str], name: str) -> bool:
    return any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns)


def layers(*numbers: int, tail: str = "self_attn.q_proj", prefix: str = "model.language_model.") -> list[str]:
    return [f"{prefix}layers.{n}.{tail}" for n in numbers]


def test_a_kind_that_is_chosen_everywhere_is_one_pattern() -> None:
    assert compact(layers(0, 1, 2)) == [r"re:.*layers\.\d+\.self_attn\.q_proj$"]


def test_a_kind_that_is_chosen_in_some_layers_lists_them() -> None:
    assert compact(layers(0, 2), layers(1)) == [r"re:.*layers\.(?:0|2)\.self_attn\.q_proj$"]


def test_listed_layers_are_whole_numbers() -> None:
    patterns = compact(layers(1), layers(0, 11, 21))
    assert matches(patterns, layers(1)[0]) and not any(matches(patterns, name) for name in layers(0, 11, 21))


def test_a_router_named_gate_is_not_a_gate_proj() -> None:
    patterns = compact(layers(0, tail="mlp.gate"))
    assert not matches(patterns, layers(0, tail="mlp.gate_proj")[0])
    assert not matches(patterns, layers(0, tail="mlp.shared_expert_gate")[0])


def test_the_prefix_is_left_open_since_loaders_rename_it() -> None:
    assert matches(compact(layers(0)), layers(0, prefix="language_model.model.")[0])


def test_a_pattern_of_the_main_model_does_not_match_mtp_layers_by_accident() -> None:
    main, mtp = layers(0, 1), layers(0, prefix="mtp.")
    patterns = compact(main, mtp, ["mtp"])
    assert len(patterns) == 1
    assert all(matches(patterns, name) for name in main) and not matches(patterns, mtp[0])
    inner = compact(mtp, main, ["mtp"])
    assert matches(inner, mtp[0]) and not any(matches(inner, name) for name in main)


def test_a_vision_tower_with_layers_of_its_own_is_told_apart() -> None:
    main = layers(0, 1)
    vision = [f"model.vision_tower.encoder.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    for chosen, others in ((main, vision), (vision, main)):
        patterns = compact(chosen, others, ["vision_tower"])
        assert [matches(patterns, name) for name in (*chosen, *others)] == [True, True, False, False]


def test_names_without_a_layer_are_spelled_out_where_their_ends_agree() -> None:
    patterns = compact(["a.linear"], ["b.linear"])
    assert matches(patterns, "a.linear") and not matches(patterns, "b.linear")


@pytest.mark.parametrize(
    ("name", "role", "found"),
    [
        ("model.visual.blocks.0.proj.weight", "vision.linear", {"visual"}),
        ("vision_tower.proj.weight", "vision.linear", {"vision_tower"}),
        ("mtp.fc.weight", "mtp.fc", {"mtp"}),
        ("mtp.layers.0.mlp.experts.down_proj", "quantized.mtp.experts.down", {"mtp"}),
        ("model.layers.61.mlp.gate.weight", "mtp.router", set()),
        ("model.layers.0.mlp.gate.weight", "router", set()),
    ],
)
def test_spaces_are_the_first_words_of_vision_and_mtp(name: str, role: str, found: set[str]) -> None:
    assert spaces([Weight(name, role, None, (2, 2), "BF16", (Piece(name),))]) == found


NAMES = st.sampled_from(
    [
        *layers(*range(3)),
        *layers(*range(3), tail="mlp.experts.0.gate_proj"),
        *layers(*range(3), tail="mlp.gate"),
        *layers(0, prefix="mtp."),
        *layers(0, tail="mlp.gate", prefix="mtp."),
        "mtp.fc",
        "lm_head",
        "model.language_model.embed_tokens",
        "model.visual.blocks.0.attn.proj",
        "model.visual.blocks.1.attn.proj",
        "model.visual.merger.proj",
    ]
)


@pytest.mark.slow
@given(st.sets(NAMES), st.sets(NAMES))
def test_all_chosen_names_match_and_no_other_does(chosen: set[str], others: set[str]) -> None:
    others -= chosen
    patterns = compact(sorted(chosen), sorted(others), ["mtp", "visual"])
    assert all(matches(patterns, name) for name in chosen)
    assert not any(matches(patterns, name) for name in others)
