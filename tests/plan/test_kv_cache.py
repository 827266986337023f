"""Scales of a KV cache: from statistics into the output, and from one dialect into another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import halfbyte
from collected import with_caches
from halfbyte.calibration import Importance
from halfbyte.calibration.statistics import read_description, write_description
from halfbyte.demo import MODEL
from halfbyte.dialects.compressed_tensors_config import CACHE as CT_SCHEME
from halfbyte.errors import PlanError, RecipeError
from halfbyte.plan.kv_cache import CALIBRATED, MTP, RESPELLED, UNSAID
from halfbyte.recipes import Recipe, parse_recipe
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, dense_tensors, linear, read_file, run, write_checkpoint

CT = "compressed-tensors"
ATTENTION = "model.layers.3.self_attn"
KEYS, VALUES = 7.3, 19.1
NAMES = {
    CT: (f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"),
    "modelopt": (f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale"),
}
NO_CACHE = parse_recipe("rules: [{match: linear, format: nvfp4}]", "t", "t")
# one matrix is quantized anew, as a recipe that quantizes nothing is refused
KEEP = parse_recipe("rules: [{match: attention.o, format: nvfp4}]", "t", "t")
MODELOPT_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}


def _recipe(top: str = "", rule: str = "match: linear, format: nvfp4") -> Recipe:
    return parse_recipe(f"kv_cache: fp8\n{top}\nrules: [{{{rule}}}]", "t", "t")


def statistics(folder: Path, caches: dict[str, dict[str, float]] | None = None) -> Path:
    """Those of the demo model."""
    return with_caches(folder, MODEL, {ATTENTION: {"keys": KEYS, "values": VALUES}} if caches is None else caches)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return statistics(tmp_path_factory.mktemp("s") / "s")


@pytest.fixture(scope="module")
def made(known: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with an FP8 KV cache, in both dialects."""
    folder = tmp_path_factory.mktemp("made")
    for dialect in NAMES:
        halfbyte.quantize(halfbyte.plan(MODEL, _recipe(), dialect=dialect, importance=known), folder / dialect)
    return folder


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def _scales(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {n: a for n, a in read_file(folder).items() if n.endswith(("k_scale", "v_scale"))}


def _rewrite(source: Path, out: Path, tensors: dict[str, Any], **settings: Any) -> Path:
    """A checkpoint with other tensors and settings of its quantization."""
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= settings
    return write_checkpoint(out, tensors, config)


@pytest.mark.parametrize(("dialect", "dtype", "shape"), [(CT, ml_dtypes.bfloat16, (1,)), ("modelopt", np.float32, ())])
def test_the_largest_key_and_value_become_the_largest_fp8_number(
    made: Path, dialect: str, dtype: Any, shape: tuple[int, ...]
) -> None:
    found = _scales(made / dialect)
    assert found.keys() == set(NAMES[dialect])
    for name, amax in zip(NAMES[dialect], (KEYS, VALUES), strict=True):
        assert found[name].dtype == dtype and found[name].shape == shape
        wanted = (np.float32(amax) / np.float32(448)).astype(dtype)
        assert found[name].tobytes() == wanted.tobytes()


def test_the_configuration_says_that_the_cache_is_fp8(made: Path) -> None:
    assert _config(made / CT)["kv_cache_scheme"] == CT_SCHEME
    assert CT_SCHEME == {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert _config(made / "modelopt")["kv_cache_scheme"] == MODELOPT_SCHEME
    extra = json.loads((made / "modelopt" / "hf_quant_config.json").read_text())
    assert extra["quantization"]["kv_cache_quant_algo"] == "FP8"


@pytest.mark.parametrize("dialect", NAMES)
def test_nothing_else_differs_and_the_plan_knows_every_byte(
    made: Path, known: Path, tmp_path: Path, dialect: str
) -> None:
    plan = halfbyte.plan(MODEL, _recipe(), dialect=dialect, importance=known)
    written = sum(path.stat().st_size for path in (made / dialect).rglob("*") if path.is_file())
    assert plan.repository_bytes == written
    plain = halfbyte.plan(MODEL, NO_CACHE, dialect=dialect, importance=known)
    assert plan.parameters == plain.parameters and plan.tensors == plain.tensors + 2
    halfbyte.quantize(plain, tmp_path / "plain")
    ours, theirs = read_file(made / dialect), read_file(tmp_path / "plain")
    assert {n: a.tobytes() for n, a in ours.items() if n not in NAMES[dialect]} == {
        n: a.tobytes() for n, a in theirs.items()
    }


def test_the_plan_names_the_scales_and_what_has_none(known: Path) -> None:
    plan = halfbyte.plan(MODEL, _recipe(), dialect=CT, importance=known)
    assert {i.weight.name for i in plan.items if i.reason == CALIBRATED} == set(NAMES[CT])
    assert MTP in plan.notes


def test_the_fingerprint_depends_on_the_key(known: Path) -> None:
    plans = [halfbyte.plan(MODEL, r, dialect=CT, importance=known) for r in (NO_CACHE, _recipe())]
    assert plans[0].fingerprint != plans[1].fingerprint


def test_a_recipe_whose_searches_have_no_choice_can_ask_for_it(known: Path) -> None:
    recipe = _recipe(rule="match: linear, format: fp8_channel, scale_search: absmax")
    assert halfbyte.plan(MODEL, recipe, dialect=CT, importance=known).tensors


@pytest.mark.parametrize("dialect", NAMES)
def test_verify_accepts_the_scales(made: Path, dialect: str) -> None:
    assert halfbyte.verify(made / dialect, MODEL).problems == []


def test_verify_notices_what_is_wrong_with_them(made: Path, tmp_path: Path) -> None:
    key, value = NAMES[CT]
    tensors = read_file(made / CT)
    zero = {**tensors, key: np.zeros(1, ml_dtypes.bfloat16)}
    lacking = {n: a for n, a in tensors.items() if n != value}
    cases = {
        "zero": _rewrite(made / CT, tmp_path / "zero", zero),
        "lacking": _rewrite(made / CT, tmp_path / "lacking", lacking),
        "unsaid": _rewrite(made / CT, tmp_path / "unsaid", tensors, kv_cache_scheme=None),
    }
    told = {}
    for name, folder in cases.items():
        (folder / "halfbyte.json").write_bytes((made / CT / "halfbyte.json").read_bytes())
        told[name] = "; ".join(p for p in halfbyte.verify(folder, MODEL).problems if "side file" not in p)
    assert f"{key}, a scale of the KV cache, is not one positive number" in told["zero"]
    assert f"{value} is missing, which the recipe wants" in told["lacking"]
    assert "does not say that the KV cache is FP8" in told["unsaid"]


def test_without_a_calibration_it_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"says `kv_cache: fp8`, but there is no calibration .*\(--calibration PATH\)"
    ):
        halfbyte.plan(MODEL, _recipe(), dialect=CT)


def test_with_an_importance_file_alone_it_is_refused() -> None:
    name = next(w.name for w in Checkpoint.open(MODEL).weights if w.role == "attention.o")
    width = next(w.shape[-1] for w in Checkpoint.open(MODEL).weights if w.name == name)
    importance = Importance({name: np.ones(width, np.float32)}, {name: np.array(1)})
    with pytest.raises(RecipeError, match="importance file, without keys and values"):
        halfbyte.plan(MODEL, _recipe(), dialect=CT, importance=importance)


def test_statistics_of_an_older_halfbyte_are_refused(tmp_path: Path) -> None:
    folder = statistics(tmp_path / "s", caches={})
    write_description(folder, {key: value for key, value in read_description(folder).items() if key != "caches"})
    with pytest.raises(RecipeError, match="s comes from an older halfbyte, without keys and values; calibrate again"):
        halfbyte.plan(MODEL, _recipe(), dialect=CT, importance=folder)


def test_where_calibration_is_optional_it_is_left_out_with_a_note(tmp_path: Path) -> None:
    recipe = _recipe("calibration: optional")
    plan = halfbyte.plan(MODEL, recipe, dialect=CT)
    assert "without a calibration the scales of the KV cache of t are left out" in plan.notes
    assert not any(item.action == "calibrate" for item in plan.items)
    halfbyte.quantize(plan, tmp_path / "out")
    assert _config(tmp_path / "out")["kv_cache_scheme"] is None
    assert halfbyte.verify(tmp_path / "out", MODEL).ok


@pytest.mark.parametrize("wrong", [0.0, np.inf, np.nan])
def test_keys_that_give_no_scale_are_refused(tmp_path: Path, wrong: float) -> None:
    folder = statistics(tmp_path / "s", caches={ATTENTION: {"keys": wrong, "values": 1.0}})
    with pytest.raises(PlanError, match=rf"{ATTENTION}: the largest of the keys .* calibrate with more text"):
        halfbyte.plan(MODEL, _recipe(), dialect=CT, importance=folder)


def test_a_layer_whose_cache_was_not_seen_is_refused(tmp_path: Path) -> None:
    folder = statistics(tmp_path / "s", caches={ATTENTION: {"keys": 1.0}})
    with pytest.raises(PlanError, match=f"{ATTENTION}: the calibration saw no values"):
        halfbyte.plan(MODEL, _recipe(), dialect=CT, importance=folder)


@pytest.mark.parametrize(("dialect", "fmt"), [("halfbyte", "mixfp4"), ("mlx", "mxfp4"), ("fp8", "fp8_block128")])
def test_dialects_without_a_word_for_it_refuse(dialect: str, fmt: str, known: Path) -> None:
    recipe = _recipe(rule=f"match: attention.o, format: {fmt}")
    with pytest.raises(PlanError, match=f"dialect {dialect} has no word for scales of a KV cache"):
        halfbyte.plan(MODEL, recipe, dialect=dialect, importance=known)


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    parts = {"k_proj": "kv_a_proj_with_mqa", "v_proj": "kv_b_proj"}
    tensors = dense_tensors()
    for before, after in parts.items():
        tensors = {name.replace(before, after): array for name, array in tensors.items()}
    config = {**DENSE_CONFIG, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    source = write_checkpoint(tmp_path / "source", tensors, config)
    with pytest.raises(PlanError, match=r"caches latents \(MLA\) instead of keys and values"):
        halfbyte.plan(source, _recipe(rule="match: mlp, format: nvfp4"), dialect="modelopt")


@pytest.mark.parametrize(("source", "target"), [(CT, "modelopt"), ("modelopt", CT)])
def test_the_scales_go_into_the_other_dialect(made: Path, tmp_path: Path, source: str, target: str) -> None:
    plan = halfbyte.plan(made / source, KEEP, dialect=target)
    assert {i.weight.name for i in plan.items if i.reason == RESPELLED} == set(NAMES[target])
    assert UNSAID not in plan.notes
    halfbyte.convert(made / source, tmp_path / "out", target)
    before, after = _scales(made / source), _scales(tmp_path / "out")
    assert after.keys() == set(NAMES[target])
    for old, new in zip(NAMES[source], NAMES[target], strict=True):
        # FP32 where the source has it, so that nothing is rounded
        assert after[new].dtype == np.float32 and after[new].shape == (() if target == "modelopt" else (1,))
        assert after[new].reshape(()) == before[old].astype(np.float32).reshape(())
    assert _config(tmp_path / "out")["kv_cache_scheme"] == (CT_SCHEME if target == CT else MODELOPT_SCHEME)
    assert halfbyte.verify(tmp_path / "out", made / source).problems == []


def test_a_respelled_scale_that_is_missing_is_noticed(made: Path, tmp_path: Path) -> None:
    halfbyte.convert(made / CT, tmp_path / "out", "modelopt")
    tensors = {n: a for n, a in read_file(tmp_path / "out").items() if n != NAMES["modelopt"][1]}
    folder = _rewrite(tmp_path / "out", tmp_path / "less", tensors)
    assert any(f"{NAMES[CT][1]} of the source is missing" in p for p in halfbyte.verify(folder, made / CT).problems)


def test_scales_of_single_heads_are_not_said_elsewhere(made: Path, tmp_path: Path) -> None:
    tensors = read_file(made / CT)
    tensors |= {name: np.ones((2, 1, 1), ml_dtypes.bfloat16) for name in NAMES[CT]}
    source = _rewrite(made / CT, tmp_path / "s", tensors, kv_cache_scheme={**CT_SCHEME, "strategy": "attn_head"})
    plan = halfbyte.plan(source, KEEP, dialect="modelopt")
    assert UNSAID in plan.notes and plan.config is not None
    assert "kv_cache_scheme" not in json.loads(plan.config)["quantization_config"]
    recipe = _recipe(rule="match: attention.o, format: nvfp4")
    with pytest.raises(PlanError, match="quantizes its KV cache in another way"):
        halfbyte.plan(source, recipe, dialect=CT)


@pytest.mark.parametrize("target", NAMES)
def test_a_source_that_has_the_scales_needs_no_calibration(made: Path, tmp_path: Path, target: str) -> None:
    recipe = _recipe(rule="match: attention.o, format: nvfp4")
    plan = halfbyte.plan(made / CT, recipe, dialect=target)
    assert not any(item.reason == CALIBRATED for item in plan.items)
    halfbyte.quantize(plan, tmp_path / "out")
    assert _scales(tmp_path / "out").keys() == set(NAMES[target])
    assert halfbyte.verify(tmp_path / "out", made / CT).problems == []


def test_every_attention_layer_of_a_dense_model_has_its_own(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG)
    layers = sorted(w.layer for w in Checkpoint.open(source).weights if w.role == "attention.k")
    caches = {f"model.layers.{i}.self_attn": {"keys": i + 1.0, "values": i + 2.0} for i in layers}
    folder = with_caches(tmp_path / "s", source, caches)
    plan = halfbyte.plan(source, _recipe(rule="match: linear, format: int4_g32"), dialect=CT, importance=folder)
    halfbyte.quantize(plan, tmp_path / "out")
    found = _scales(tmp_path / "out")
    assert len(found) == 2 * len(layers)
    for i in layers:
        wanted = np.float32((i + 1) / 448).astype(ml_dtypes.bfloat16)
        assert found[f"model.layers.{i}.self_attn.k_scale"] == wanted
    assert halfbyte.verify(tmp_path / "out", source).ok
    # and a recipe without the key says nothing of caches, as before
    run(source, tmp_path / "plain", linear("int4_g32"), CT)
    assert not _scales(tmp_path / "plain") and _config(tmp_path / "plain")["kv_cache_scheme"] is None
