from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.checkpoint import Inventory
from halfbyte.compatibility.engine_facts import PLAIN, Engine, Fact, compatibility_notes, engines
from halfbyte.dialects import list_dialects
from halfbyte.formats import list_formats
from halfbyte.models import families
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.overview import overview
from small_models import DENSE_CONFIG, MOE_CONFIG, dense_tensors, linear, moe_tensors, run, write_checkpoint

FACTS = [pytest.param(e, f, id=f"{e.name}-{i}") for e in engines() for i, f in enumerate(e.facts)]


def effects(path: Path, engine: str) -> list[tuple[str, str]]:
    return [(f.effect, f.hardware) for f in overview(Checkpoint.open(path)).engines[engine]]


@pytest.mark.parametrize(("engine", "fact"), FACTS)
def test_a_fact_names_dialects_families_and_formats_that_exist(engine: Engine, fact: Fact) -> None:
    known = {PLAIN, *(dialect.name for dialect in list_dialects())}
    assert set(engine.reads) | set(fact.dialects) <= known
    assert set(fact.families) <= {family.name for family in families()}
    for pattern in fact.formats:
        assert any(fnmatchcase(name, pattern) for name in list_formats()), pattern


@pytest.mark.parametrize(("engine", "fact"), FACTS)
def test_a_fact_names_the_version_that_it_was_checked_with(engine: Engine, fact: Fact) -> None:
    assert fact.version or engine.name == "halfbyte"
    assert fact.what and not fact.what.endswith(".")


def test_an_entry_without_a_version_is_refused() -> None:
    fact = {"effect": "loses", "what": "MTP", "known": "ran"}
    with pytest.raises(ValueError, match="names no version that it was checked with"):
        Engine.model_validate({"name": "new", "reads": ["plain"], "facts": [fact]})
    Engine.model_validate({"name": "new", "reads": ["plain"], "facts": [fact | {"version": "1.0"}]})


def test_installed_versions_are_those_of_this_environment() -> None:
    engine = Engine.model_validate({"name": "new", "reads": ["plain"], "packages": ["numpy", "no-such-package"]})
    assert engine.installed() == {"numpy": np.__version__}


def test_nvfp4_experts_are_wrong_in_transformers_and_dense_nvfp4_is_not(tmp_path: Path) -> None:
    for name, tensors, config in (("moe", moe_tensors(), MOE_CONFIG), ("dense", dense_tensors(), DENSE_CONFIG)):
        run(
            write_checkpoint(tmp_path / name, tensors, config),
            tmp_path / f"{name}-ct",
            linear("nvfp4"),
            "compressed-tensors",
        )
    found = overview(Checkpoint.open(tmp_path / "moe-ct")).engines["transformers"]
    wrong = [f for f in found if f.effect == "wrong"]
    assert len(wrong) == 1 and wrong[0].link == "huggingface/transformers#48371"
    assert wrong[0].tensors == 2 * 4 * 3 * 3  # layers, experts, projections, arrays
    assert effects(tmp_path / "dense-ct", "transformers") == []
    assert effects(tmp_path / "dense-ct", "vLLM") == [("needs", "CPU")]


def test_fused_and_single_experts_are_not_the_same_to_mlx(tmp_path: Path) -> None:
    for name, per_expert in (("fused", False), ("single", True)):
        write_checkpoint(tmp_path / name, moe_tensors(per_expert), MOE_CONFIG)
    assert effects(tmp_path / "fused", "mlx-lm") == [("loses", ""), ("loses", "")]
    # what does not load at all loses nothing more
    assert effects(tmp_path / "single", "mlx-lm") == [("refuses", "")]


def test_a_mixture_of_formats_is_refused_where_engines_want_one(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "moe", moe_tensors(), MOE_CONFIG)
    run(source, tmp_path / "mixed", "nvfp4-fp8", "compressed-tensors")
    run(source, tmp_path / "one", linear("nvfp4"), "compressed-tensors")
    assert effects(tmp_path / "mixed", "llama.cpp") == [("refuses", "")]
    assert effects(tmp_path / "one", "llama.cpp") == []


def test_a_dialect_that_nobody_tried_is_said_to_be_unknown() -> None:
    (found,) = compatibility_notes("llama", "gpt-oss", [])["mlx-lm"]
    assert found.effect == "unknown" and found.what == "not tried with the dialect gpt-oss"


def test_quantized_checkpoints_of_a_family_that_nobody_tried_are_not_vouched_for() -> None:
    (note,) = compatibility_notes("granite_moe", "compressed-tensors", [])["vLLM"]
    assert note.effect == "unknown" and "the family granite_moe" in note.what
    assert compatibility_notes("llama", "compressed-tensors", [])["vLLM"] == []
    assert compatibility_notes("granite_moe", None, [])["vLLM"] == []


def test_the_families_of_an_engine_exist() -> None:
    known = {family.name for family in families()}
    assert {name for engine in engines() for name in engine.families} <= known


def test_what_is_lost_is_counted(shared: Path) -> None:
    inventory = Inventory.from_json(shared / "inventories" / "qwen36_35b_a3b.json")
    found = overview(Checkpoint(inventory)).engines["mlx-lm"]
    assert [(f.tensors, f.nbytes) for f in found] == [(333, 893_142_496), (19, 1_689_281_536)]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"roles": ["no_such_role"]}, "there is no role"), ({"effect": "explodes"}, "effect"), ({"extra": 1}, "extra")],
)
def test_a_fact_with_a_mistake_is_refused(change: dict[str, Any], message: str) -> None:
    fact = {"effect": "loses", "what": "MTP", "known": "ran", **change}
    with pytest.raises(ValueError, match=message):
        Fact.model_validate(fact)
