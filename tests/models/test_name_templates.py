from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.models.name_templates import Templates, merge, normalise, split_numbers


def test_only_whole_components_count_as_numbers() -> None:
    assert normalise("layers.12.linear_attn.conv1d.w2.weight") == "layers.#.linear_attn.conv1d.w2.weight"


def test_numbers_at_either_end_are_found() -> None:
    assert normalise("0.weight.7") == "#.weight.#"


@pytest.mark.slow
@given(st.lists(st.sampled_from(["layers", "12", "w1", "0", "weight", "conv1d"]), min_size=1))
def test_split_and_normalise_agree_for_any_name(components: list[str]) -> None:
    name = ".".join(components)
    parts = split_numbers(name)
    assert "".join(parts) == name
    assert "#".join(parts[::2]) == normalise(name)


def test_the_first_fitting_template_wins() -> None:
    templates = Templates([("layers.{layer}.a.weight", "first"), ("*.weight", "second")])
    found = templates.find("layers.#.a.weight")
    assert found is not None and found.value == "first"


def test_a_template_must_fit_the_whole_name() -> None:
    assert Templates([("mlp.gate.weight", "router")]).find("mlp.gate.weight_scale") is None


def test_dots_are_literal() -> None:
    assert Templates([("a.weight", "x")]).find("axweight") is None


def test_layer_and_expert_are_found_among_the_numbers() -> None:
    found = Templates([("*.layers.{layer}.experts.{expert}.w", "x")]).find("tower.#.layers.#.experts.#.w")
    assert found is not None and (found.layer, found.expert) == (1, 2)


def test_without_a_named_layer_the_first_number_is_the_layer() -> None:
    found = Templates([("*norm.weight", "norm")]).find("h.#.norm.weight")
    assert found is not None and found.layer == 0


def test_a_name_without_numbers_has_no_layer() -> None:
    found = Templates([("*norm.weight", "norm")]).find("norm.weight")
    assert found is not None and found.layer is None


def test_merge_puts_the_childs_entries_first() -> None:
    assert list(merge({"b": "1", "a": "2"}, {"a": "3", "c": "4"}).items()) == [("b", "1"), ("a", "2"), ("c", "4")]
