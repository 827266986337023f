"""Which dialect an output gets that names none."""

from __future__ import annotations

import pytest

from halfbyte.errors import PlanError
from halfbyte.plan.dialect_choice import best_dialect, find_dialect, suggestion
from halfbyte.recipes import load_recipe


@pytest.mark.parametrize(
    ("recipe", "dialect"),
    [
        ("nvfp4", "compressed-tensors"),
        ("mxfp4", "compressed-tensors"),
        ("int4-g128", "compressed-tensors"),
        ("mixfp4", "halfbyte"),
        ("razer", "halfbyte"),
        ("ud-q4", "mlx"),
    ],
)
def test_without_a_wish_it_is_the_one_that_most_engines_load(recipe: str, dialect: str) -> None:
    assert best_dialect(load_recipe(recipe)) == dialect


@pytest.mark.parametrize(
    ("recipe", "engine", "dialect"),
    [
        ("nvfp4", "vllm", "compressed-tensors"),
        ("mxfp4", "mlx", "mlx"),
        ("mxfp4", "llama.cpp", "gguf"),
        ("mixfp4", "transformers", "halfbyte"),
        ("mixfp4", "vllm", "compressed-tensors"),
        ("nvfp4", "sglang", "compressed-tensors"),
    ],
)
def test_for_an_engine_it_is_one_that_it_loads(recipe: str, engine: str, dialect: str) -> None:
    assert best_dialect(load_recipe(recipe), engine) == dialect


def test_an_engine_that_loads_the_format_in_no_dialect_is_refused() -> None:
    with pytest.raises(PlanError, match="mlx-lm is not known to load mixfp4"):
        best_dialect(load_recipe("mixfp4"), "mlx")


def test_an_engine_given_for_a_dialect_gets_a_suggestion() -> None:
    assert (
        "reads compressed-tensors" in suggestion("vllm") and suggestion("mlx-lm") != "" and not suggestion("nonsense")
    )


def test_a_dialect_that_is_called_like_an_engine_is_a_dialect() -> None:
    from halfbyte.dialects import list_dialects
    from halfbyte.plan.dialect_choice import suggestion

    assert not any(suggestion(dialect.name) for dialect in list_dialects())
    assert "is an engine" in suggestion("vllm")


def test_an_engine_named_for_a_dialect_is_told_what_it_reads() -> None:
    with pytest.raises(PlanError, match="vLLM is an engine; it reads compressed-tensors"):
        find_dialect("vllm")
    assert find_dialect("compressed-tensors").name == "compressed-tensors"
