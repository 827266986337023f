"""Recipes that round with Hessians: the conversion does what the pure functions do, however it is cut."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from halfbyte.calibration.statistics import Part, new_description, write_description, write_part
from halfbyte.calibration.token_counts import MIN_TOKENS
from halfbyte.checkpoint import Reader
from halfbyte.cli import main
from halfbyte.convert.conversion import convert
from halfbyte.convert.hessian_cache import Hessians
from halfbyte.demo import MODEL
from halfbyte.errors import PlanError, RecipeError
from halfbyte.recipes import parse_recipe
from halfbyte.search.gptq import gptq, prepare
from halfbyte.search.local_hessian import prepare_local
from halfbyte.search.soar import soar_global_scale
from halfbyte.source.checkpoint import Checkpoint
from invented import invented_statistics, part_of
from search.hessians import output_error

NVFP4 = parse_recipe("rules: [{match: linear, format: nvfp4, rounding: gptq}]", "t", "t")
NEAREST = parse_recipe("rules: [{match: linear, format: nvfp4}]", "t", "t")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return invented_statistics(tmp_path_factory.mktemp("s") / "statistics")


@pytest.fixture(scope="module")
def quantized(statistics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("q") / "out"
    halfbyte.quantize(halfbyte.plan(MODEL, NVFP4, importance=statistics), out)
    return out


@pytest.mark.slow
def test_the_conversion_gives_what_the_function_gives(quantized: Path, statistics: Path) -> None:
    source, out = Checkpoint.open(MODEL), Checkpoint.open(quantized)
    known = halfbyte.plan(MODEL, NVFP4, importance=statistics).calibration_use
    assert known is not None
    names = {w.role: w for w in source.weights}
    with Reader(source.inventory) as reader, Reader(out.inventory) as written:
        for role, expert in (("attention.o", None), ("experts.down", 0)):
            weight = names[role]
            array = source.read(reader, weight) if expert is None else source.read(reader, weight, expert, expert + 1)
            mine = out.read_quantized(written, weight) if expert is None else out.read_quantized(written, weight, 0, 1)
            hessian = known.calibration.hessian(weight.name, expert)
            expected = gptq(array, "nvfp4", "sweep", hessian, global_scale=mine.global_scale)
            np.testing.assert_array_equal(mine.codes, expected.codes)
            np.testing.assert_array_equal(mine.scales, expected.scales)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["rounding: gptq", "objective: local_hessian"])
def test_a_fitted_tensor_scale_is_given_to_the_rounding(statistics: Path, tmp_path: Path, asked: str) -> None:
    rule = f"{{match: linear, format: nvfp4, scale_search: absmax, global_scale: soar, {asked}}}"
    plan = halfbyte.plan(MODEL, parse_recipe(f"rules: [{rule}]", "t", "t"), importance=statistics)
    convert(plan, tmp_path / "out")
    assert plan.calibration_use is not None
    known, prepared = plan.calibration_use.calibration, prepare if "gptq" in asked else prepare_local
    source, out = Checkpoint.open(MODEL), Checkpoint.open(tmp_path / "out")
    names = {w.role: w for w in source.weights}
    with Reader(source.inventory) as reader, Reader(out.inventory) as written:
        for role, expert, stop in (("attention.o", None, None), ("experts.down", 0, 1)):
            array = source.read(reader, names[role], 0, stop)
            mine = out.read_quantized(written, names[role], 0, stop)
            scale = soar_global_scale([array], "nvfp4", "absmax").global_scale
            hessian = prepared(known.hessian(names[role].name, expert), "nvfp4")
            expected = gptq(array, "nvfp4", "absmax", hessian, global_scale=scale)
            np.testing.assert_array_equal(mine.global_scale, scale)
            np.testing.assert_array_equal(mine.codes, expected.codes)


@pytest.mark.slow
def test_the_error_of_outputs_is_smaller_than_that_of_rounding_to_nearest(
    quantized: Path, statistics: Path, tmp_path: Path
) -> None:
    halfbyte.quantize(MODEL, tmp_path / "nearest", NEAREST)
    source = Checkpoint.open(MODEL)
    known = halfbyte.plan(MODEL, NVFP4, importance=statistics).calibration_use
    assert known is not None
    with Reader(source.inventory) as reader:
        for weight in (w for w in source.weights if w.name in known.rounded and len(w.shape) == 2):
            array = np.asarray(source.read(reader, weight), dtype=np.float32)
            hessian = known.calibration.hessian(weight.name)
            errors = []
            for folder in (quantized, tmp_path / "nearest"):
                other = Checkpoint.open(folder)
                with Reader(other.inventory) as opened:
                    errors.append(output_error(array, other.read(opened, weight), hessian))
            assert errors[0] < 0.7 * errors[1], weight.name


def test_the_bytes_depend_on_neither_threads_nor_memory(statistics: Path, quantized: Path, tmp_path: Path) -> None:
    plan = halfbyte.plan(MODEL, NVFP4, importance=statistics)
    convert(plan, tmp_path / "out", threads=1, memory=1 << 20)
    for file in quantized.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_experts_with_few_tokens_are_rounded_to_nearest_and_reported(statistics: Path, quantized: Path) -> None:
    plan = halfbyte.plan(MODEL, NVFP4, importance=statistics)
    assert plan.calibration_use is not None
    name = next(n for n in plan.calibration_use.starved if n.endswith("layers.0.mlp.experts.down_proj"))
    assert plan.calibration_use.starved[name] == [1]
    assert any(f"fewer than {MIN_TOKENS} tokens reached 8 experts" in note for note in plan.notes)
    source, out = Checkpoint.open(MODEL), Checkpoint.open(quantized)
    weight = next(w for w in source.weights if w.name == name)
    with Reader(source.inventory) as reader, Reader(out.inventory) as written:
        importance = plan.calibration_use.calibration.slice(name, 1, 2).importance
        mine = out.read_quantized(written, weight, 1, 2)
        array = source.read(reader, weight, 1, 2)
    expected = halfbyte.encode(array, "nvfp4", "sweep", importance)
    np.testing.assert_array_equal(mine.codes, expected.codes)


def test_experts_that_share_a_hessian_all_use_it(tmp_path: Path) -> None:
    folder = invented_statistics(tmp_path / "s", pooled=True)
    plan = halfbyte.plan(MODEL, NVFP4, importance=folder)
    assert plan.calibration_use is not None and not plan.calibration_use.starved
    assert sum(".experts." in name for name in plan.calibration_use.rounded) == 8
    halfbyte.quantize(plan, tmp_path / "out")
    assert halfbyte.verify(tmp_path / "out", MODEL).ok


IN_LOOP = {"mode": "in_loop", "order": "none", "damping": 0.01}


@pytest.mark.parametrize(
    ("method", "prepared"),
    [
        ({"mode": "static"}, {"mode": "static"}),
        ({"mode": "compensated"}, {"mode": "compensated"}),
        ({"order": "act"}, {"order": "act"}),
        ({"damping": 0.25}, {"damping": 0.25}),
        ({"name": "local_hessian"}, {"mode": "local_hessian"}),
    ],
)
def test_one_hessian_is_factored_anew_for_another_method(
    statistics: Path, method: dict[str, Any], prepared: dict[str, Any]
) -> None:
    plan = halfbyte.plan(MODEL, NVFP4, importance=statistics)
    assert plan.calibration_use is not None
    hessians = Hessians(plan.calibration_use.calibration, 1 << 30)
    item = next(i for i in plan.items if i.method and i.weight.role == "attention.o")
    assert item.method is not None
    first = hessians.slice(item, 0, 8, None)
    second = hessians.slice(replace(item, method=item.method._replace(**method)), 0, 8, None)
    facts = [{name: getattr(p, name) for name in IN_LOOP} for p in (*first, *second)]
    assert facts == [IN_LOOP, IN_LOOP | prepared]
    assert hessians.slice(item, 8, 16, None)[0] is first[0]


def test_a_gptq_recipe_without_calibration_is_refused() -> None:
    message = r"`rounding: gptq`, which needs a calibration; give text or statistics \(--calibration PATH\)"
    with pytest.raises(RecipeError, match=message):
        halfbyte.plan(MODEL, "nvfp4-gptq")


def test_statistics_without_hessians_are_refused_for_gptq(tmp_path: Path) -> None:
    folder = invented_statistics(tmp_path / "s", hessians=False)
    with pytest.raises(RecipeError, match="holds no Hessians"):
        halfbyte.plan(MODEL, "nvfp4-gptq", importance=folder)


def test_gptq_of_a_format_without_blocks_along_k_is_refused(statistics: Path) -> None:
    recipe = parse_recipe(
        "rules: [{match: linear, format: fp8_channel, scale_search: absmax, rounding: gptq}]", "t", "t"
    )
    with pytest.raises(RecipeError, match="no plain blocks"):
        halfbyte.plan(MODEL, recipe, importance=statistics)


def test_other_statistics_are_another_plan(statistics: Path, tmp_path: Path) -> None:
    one = halfbyte.plan(MODEL, NVFP4, importance=statistics)
    two = halfbyte.plan(MODEL, NVFP4, importance=invented_statistics(tmp_path / "s", starved=False))
    assert one.fingerprint != two.fingerprint


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    part = Part(
        {"model.layers.0.foreign.weight": part_of(Checkpoint.open(MODEL).weights[0], np.random.default_rng(0), False)}
    )
    folder = tmp_path / "s"
    folder.mkdir()
    write_part(folder, "all", part)
    write_description(folder, new_description(texts=[], samples=1, tokens=1, parts=["all"]) | {"complete": True})
    with pytest.raises(PlanError, match="made for another model"):
        halfbyte.plan(MODEL, NVFP4, importance=folder)


@pytest.mark.slow
def test_one_command_calibrates_and_quantizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    command = ["quantize", str(MODEL), str(out), "--recipe", "nvfp4-gptq", "--json", "--verify"]
    text = str(MODEL / "heldout.txt")
    assert main([*command, "--calibration", text, "--samples", "4", "--length", "64"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["importance"]["rounded_with_hessian"] == 33 and told["verification"]["ok"]
    assert (tmp_path / "out.statistics" / "statistics.json").is_file()


@pytest.mark.slow
def test_weights_that_errors_were_fed_back_to_may_be_further_from_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halfbyte.quantize(MODEL, tmp_path / "gptq", NVFP4, importance=invented_statistics(tmp_path / "s"))
    halfbyte.quantize(MODEL, tmp_path / "nearest", NEAREST)
    # both errors lie between this and 0.5
    monkeypatch.setattr(import_module("halfbyte.kernels.tensor_error"), "MAX_RELMSE", 1e-3)
    assert halfbyte.verify(tmp_path / "gptq", MODEL, max_relmse=1e-3).ok
    assert not halfbyte.verify(tmp_path / "nearest", MODEL, max_relmse=1e-3).ok
    assert not halfbyte.verify(tmp_path / "gptq", MODEL, max_relmse=2e-3).ok
