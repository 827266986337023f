from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.checkpoint import Inventory, build_header
from halfbyte.dialects.compressed_tensors import modules
from halfbyte.errors import FormatError, HalfbyteError, PlanError, RecipeError
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.recipes import load_recipe, parse_recipe
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import (
    DATA_FREE,
    DENSE_CONFIG,
    MOE_CONFIG,
    dense_tensors,
    linear,
    moe_tensors,
    read_file,
    recipe,
    run,
    write_checkpoint,
)
from timing import within

DIALECTS = ["halfbyte", "compressed-tensors"]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)


@pytest.fixture(scope="module")
def qwen36(request: pytest.FixtureRequest) -> Checkpoint:
    shared: Path = request.getfixturevalue("shared")
    return Checkpoint(Inventory.from_json(shared / "inventories" / "qwen36_35b_a3b.json"))


def outputs(plan: Plan) -> dict[str, str]:
    return {o.name: o.dtype for item in plan.items for o in item.outputs}


# Sizes that were published


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dialect", "gib"),
    [
        ("makora-mixfp4", "halfbyte", 21.29),
        ("nvidia-nvfp4", "compressed-tensors", 21.85),
        ("nvfp4-fp8", "compressed-tensors", 23.52),
    ],
)
def test_published_repository_sizes_are_met_to_a_hundredth(
    qwen36: Checkpoint, name: str, dialect: str, gib: float
) -> None:
    plan = make_plan(qwen36, name, dialect)
    assert abs(plan.repository_bytes / 2**30 - gib) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dialect"),
    [("makora-mixfp4", "halfbyte"), ("nvidia-nvfp4", "compressed-tensors"), ("nvfp4-fp8", "compressed-tensors")],
)
def test_a_published_recipe_is_written_in_its_own_dialect_unless_told_otherwise(
    qwen36: Checkpoint, name: str, dialect: str
) -> None:
    assert make_plan(qwen36, name).dialect.name == dialect
    assert make_plan(qwen36, name, "halfbyte").dialect.name == "halfbyte"


@pytest.mark.slow
def test_what_is_left_to_the_nvidia_size_are_the_input_scales_of_modelopt(qwen36: Checkpoint) -> None:
    plan = make_plan(qwen36, "nvidia-nvfp4", "compressed-tensors")
    weight_map: dict[str, str] = {}
    rename = {"weight_packed": "weight", "weight_global_scale": "weight_scale_2"}
    size = 0
    for shard in plan.shards:
        entries = []
        for item in shard.items:
            for o in item.outputs:
                module, _, last = o.name.rpartition(".")
                entries.append((f"{module}.{rename.get(last, last)}", o.dtype, () if o.shape == (1,) else o.shape))
            if item.format is not None:
                entries += [(f"{m.name}.input_scale", "F32", ()) for m in modules(item.weight)]
        size += build_header(entries).total
        weight_map |= dict.fromkeys((name for name, _, _ in entries), shard.name)
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2)
    others = plan.repository_bytes - plan.shard_bytes - len(plan.index or b"")
    assert round((size + len(index) + others) / 2**30, 2) == 21.85


# Refusals


@pytest.mark.parametrize(
    ("what", "dialect", "error", "message"),
    [
        ("mixfp5", None, RecipeError, "there is no recipe 'mixfp5'; nearest: mixfp4"),
        (
            recipe({"match": "linear", "format": "nvfp5"}),
            None,
            FormatError,
            "unknown format 'nvfp5': did you mean nvfp4",
        ),
        (
            recipe({"match": "linear", "format": "nvfp4", "scale_search": "swep"}),
            None,
            FormatError,
            "unknown search 'swep': did you mean sweep",
        ),
        ("nvfp4", "compressed-tensor", PlanError, "unknown dialect 'compressed-tensor'; known dialects: .*halfbyte"),
        (recipe({"match": "norm", "format": "nvfp4"}), None, PlanError, "rule 1 .* which is no floating-point matrix"),
        (recipe({"match": "linear", "keep": True}), None, PlanError, "quantizes nothing"),
        (
            recipe({"match": "linear", "format": "int4_g128", "scale_search": "four_over_six"}),
            None,
            FormatError,
            "four_over_six.* needs E2M1",
        ),
    ],
)
def test_unknown_and_impossible_wishes_are_refused(
    moe: Path, what: Any, dialect: str | None, error: type[HalfbyteError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        make_plan(Checkpoint.open(moe), what, dialect)
    assert "\n" not in str(raised.value)


def test_integers_are_not_quantized(tmp_path: Path) -> None:
    tensors = dense_tensors() | {"model.layers.0.self_attn.o_proj.weight": np.ones((128, 128), np.int64)}
    source = write_checkpoint(tmp_path / "source", tensors, DENSE_CONFIG)
    with pytest.raises(PlanError, match=r"o_proj\.weight in .* holds packed codes \(I64\)"):
        make_plan(Checkpoint.open(source), recipe({"match": r"re:self_attn\.o_proj", "format": "nvfp4"}))


# Sources that are quantized already


MIXED = recipe(
    {"match": "experts", "format": "nvfp4", "scale_search": "absmax"},
    {"match": "attention", "format": "fp8_channel", "scale_search": "absmax"},
)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_quantized_already_is_kept_byte_for_byte_and_stays_in_the_configuration(
    moe: Path, tmp_path: Path, dialect: str
) -> None:
    run(moe, tmp_path / "first", MIXED, dialect)
    shared_experts = recipe({"match": "shared_expert", "format": "int4_g32", "scale_search": "absmax"})
    run(tmp_path / "first", tmp_path / "second", shared_experts, dialect)
    first, second = Checkpoint.open(tmp_path / "first"), Checkpoint.open(tmp_path / "second")
    assert {n: f.name for n, f in second.formats.items() if "shared_expert" not in n} == {
        n: f.name for n, f in first.formats.items()
    }
    assert {f.name for n, f in second.formats.items() if "shared_expert" in n} == {"int4_g32"}
    before, after = read_file(tmp_path / "first"), read_file(tmp_path / "second")
    same = [name for name in before if name in after]
    assert len(same) == len(before) - 2 * 3 and all(before[n].tobytes() == after[n].tobytes() for n in same)
    assert verify(tmp_path / "second", tmp_path / "first").problems == []


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("target", DIALECTS)
def test_a_quantized_checkpoint_can_be_quantized_to_another_format(
    moe: Path, tmp_path: Path, dialect: str, target: str
) -> None:
    run(moe, tmp_path / "first", linear("fp8_channel"), dialect)
    plan = run(tmp_path / "first", tmp_path / "second", linear("nvfp4"), target)
    result = verify(tmp_path / "second", tmp_path / "first")
    assert result.problems == [] and result.quantized == sum(item.format is not None for item in plan.items)
    assert verify(tmp_path / "second", moe).problems == []


def test_kept_quantized_weights_that_the_new_dialect_cannot_spell_are_refused(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "first", recipe({"match": "linear", "format": "razer", "scale_search": "absmax"}), "halfbyte")
    with pytest.raises(PlanError, match=r"is razer in the source and kept by the recipe, but .* no spelling for razer"):
        make_plan(
            Checkpoint.open(tmp_path / "first"), recipe({"match": "experts", "format": "mxfp4"}), "compressed-tensors"
        )


@pytest.mark.parametrize("name", DATA_FREE)
def test_every_recipe_survives_its_way_through_the_provenance_file(moe: Path, name: str) -> None:
    rule = {"match": "lm_head", "format": "nvfp4"}
    wanted = load_recipe(name)
    suited = wanted.model_copy(
        update={"rules": tuple(r.model_copy(update={"optional": True}) for r in wanted.rules) + recipe(rule).rules}
    )
    told = json.loads(make_plan(Checkpoint.open(moe), suited, "halfbyte").provenance)["recipe"]
    assert parse_recipe(json.dumps(told), "provenance").model_dump() == suited.model_dump()


# Time and determinism


@pytest.mark.slow
def test_125_000_tensors_are_planned_in_two_seconds_from_headers_alone(tmp_path: Path) -> None:
    layers, experts = 162, 256
    entries = [
        (f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight", "BF16", shape)
        for layer in range(layers)
        for e in range(experts)
        for part, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32)))
    ]
    entries += [(f"model.layers.{layer}.mlp.gate.weight", "BF16", (experts, 64)) for layer in range(layers)]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "hidden_size": 64}))
    layout = build_header(entries)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(layout.header)
        file.truncate(layout.total)  # a hole: no weight is there to be read

    def planned() -> Plan:
        plan = make_plan(Checkpoint.open(tmp_path), "nvfp4")
        assert len(plan.summary()["classes"]) == 3 and plan.fingerprint
        return plan

    plan = within(6, planned)  # about 2 s when nothing else runs
    assert len(entries) >= 124_000 and plan.parameters == 3 * 32 * 64 * layers * experts + 64 * layers * experts


def test_the_same_inputs_give_the_same_plan_and_others_another_one(moe: Path) -> None:
    def fingerprint(what: str = "nvfp4", dialect: str = "halfbyte", limit: int = 10**9, **extra: bytes) -> str:
        return make_plan(Checkpoint.open(moe), what, dialect, limit, extra).fingerprint

    assert fingerprint() == fingerprint()
    others = [
        fingerprint("mixfp4"),
        fingerprint(dialect="compressed-tensors"),
        fingerprint(limit=100_000),
        fingerprint(README=b"x"),
    ]
    assert len({fingerprint(), *others}) == 5


def test_the_plan_of_one_spelling_of_experts_quantizes_what_the_other_does(moe: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "moe", moe_tensors(per_expert=True), MOE_CONFIG)
    plans = [make_plan(Checkpoint.open(p), "nvfp4", "compressed-tensors") for p in (moe, other)]
    found = [{o.name: (o.dtype, o.shape) for i in p.items if i.format for o in i.outputs} for p in plans]
    assert found[0] == found[1]


def test_extra_files_replace_side_files_and_are_counted(moe: Path, tmp_path: Path) -> None:
    plan = run(moe, tmp_path / "out", linear("nvfp4"), extra_files={"README.md": b"card", "tokenizer.json": b"new"})
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"new"
    assert (tmp_path / "out" / "README.md").read_bytes() == b"card"
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) == plan.repository_bytes


def test_a_vector_of_a_role_that_is_quantized_is_kept_or_refused(tmp_path: Path) -> None:
    tensors = {**dense_tensors(), "model.layers.0.self_attn.q_proj.bias": np.ones(128, np.float32)}
    source = write_checkpoint(tmp_path / "source", tensors, DENSE_CONFIG)
    what = {"match": "re:q_proj|k_proj|v_proj", "format": "int4_g32", "scale_search": "absmax"}
    with pytest.raises(PlanError, match=r"q_proj\.bias \(F32 \[128\]\), which is no floating-point matrix"):
        make_plan(Checkpoint.open(source), recipe(what))
    plan = run(source, tmp_path / "out", recipe(what | {"if_not_divisible": "keep"}))
    kept = next(item for item in plan.items if item.weight.name.endswith("q_proj.bias"))
    assert (kept.action, kept.reason, kept.declined) == ("keep", "it is a vector and no matrix", "int4_g32")
    assert verify(tmp_path / "out", source).ok
