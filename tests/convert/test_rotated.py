"""Recipes that rotate blocks of columns: what is written is what the functions give, and every reader undoes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import halfbyte
from halfbyte.checkpoint import Reader
from halfbyte.convert.conversion import convert
from halfbyte.demo import MODEL
from halfbyte.errors import PlanError, RecipeError
from halfbyte.formats import get_format
from halfbyte.formats.rotation import plain_swaps
from halfbyte.recipes import Recipe, parse_recipe
from halfbyte.search import encode
from halfbyte.search.gptq import gptq
from halfbyte.search.rotated_space import duquant_swaps
from halfbyte.source.checkpoint import Checkpoint
from invented import invented_statistics
from small_models import DENSE_CONFIG, MOE_CONFIG, dense_tensors, hashes, moe_tensors, read_file, run, write_checkpoint


def asking(transform: str, fmt: str = "mxfp4", more: str = "") -> Recipe:
    rule = f"{{match: linear, format: {fmt}, transform: {transform}, if_not_divisible: keep{more}}}"
    return parse_recipe(f"rules: [{rule}]", "t", "t")


PLAIN = parse_recipe("rules: [{match: experts, format: nvfp4}]", "t", "t")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return invented_statistics(tmp_path_factory.mktemp("s") / "statistics")


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_a_hadamard_rotation_needs_no_calibration_and_reads_back_upright(fmt: str, tmp_path: Path) -> None:
    plan = run(MODEL, tmp_path / "out", asking("hadamard", fmt))
    assert halfbyte.verify(tmp_path / "out", MODEL).ok
    assert plan.repository_bytes == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    source, out = Checkpoint.open(MODEL), Checkpoint.open(tmp_path / "out")
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    weight = next(w for w in source.weights if w.role == "experts.down")
    assert {f.name for f in out.formats.values()} == {f"{fmt}_hadamard"}, name
    with Reader(source.inventory) as reader, Reader(out.inventory) as written:
        array = source.read(reader, weight)
        expected = encode(array, f"{fmt}_hadamard")
        mine = out.read_quantized(written, weight)
        assert np.array_equal(mine.codes, expected.codes) and np.array_equal(mine.scales, expected.scales)
        assert np.array_equal(out.read(written, weight), expected.decode())


@pytest.mark.slow
def test_duquant_rotations_are_found_from_each_weights_own_hessian(statistics: Path, tmp_path: Path) -> None:
    plan = halfbyte.plan(MODEL, asking("duquant"), importance=statistics)
    convert(plan, tmp_path / "out")
    assert plan.calibration_use is not None and len(plan.calibration_use.rotated_by_inputs) > 10
    assert any("rotated to fit their inputs" in note for note in plan.notes)
    source, out = Checkpoint.open(MODEL), Checkpoint.open(tmp_path / "out")
    names = {w.role: w for w in source.weights}
    with Reader(source.inventory) as reader, Reader(out.inventory) as written:
        matrix, stack = names["attention.o"], names["experts.down"]
        known = plan.calibration_use.calibration
        steps = duquant_swaps(known.hessian(matrix.name))
        mine = out.read_quantized(written, matrix)
        assert np.array_equal(mine.rotation, steps)
        expected = encode(source.read(reader, matrix), "mxfp4_duquant", rotation=steps)
        assert np.array_equal(mine.codes, expected.codes)
        mine = out.read_quantized(written, stack, 0, 2)
        assert np.array_equal(mine.rotation[0], duquant_swaps(known.hessian(stack.name, 0)))
        # too few tokens reached this expert
        assert np.array_equal(mine.rotation[1], plain_swaps(mine.rotation[1].shape))
    assert halfbyte.verify(tmp_path / "out", MODEL).ok


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["hadamard", "duquant"])
def test_gptq_rounds_in_rotated_space(transform: str, statistics: Path, tmp_path: Path) -> None:
    plan = halfbyte.plan(
        MODEL, asking(transform, more=", rounding: gptq, static_groups: true, order: act"), importance=statistics
    )
    convert(plan, tmp_path / "out")
    assert plan.calibration_use is not None
    source, out = Checkpoint.open(MODEL), Checkpoint.open(tmp_path / "out")
    weight = next(w for w in source.weights if w.role == "attention.o")
    with Reader(source.inventory) as reader, Reader(out.inventory) as written:
        hessian = plan.calibration_use.calibration.hessian(weight.name)
        array, mine = source.read(reader, weight), out.read_quantized(written, weight)
        expected = gptq(array, f"mxfp4_{transform}", "sweep", hessian, mode="static", order="act")
    assert np.array_equal(mine.codes, expected.codes) and np.array_equal(mine.scales, expected.scales)
    assert halfbyte.verify(tmp_path / "out", MODEL).ok


@pytest.mark.slow
def test_the_bytes_depend_on_neither_threads_nor_memory(statistics: Path, tmp_path: Path) -> None:
    plan = halfbyte.plan(MODEL, asking("duquant", more=", rounding: gptq"), importance=statistics)
    convert(plan, tmp_path / "a", threads=2)
    convert(plan, tmp_path / "b", threads=1, memory=1 << 20)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_transform_is_a_format_by_its_name_too(tmp_path: Path) -> None:
    run(MODEL, tmp_path / "a", asking("hadamard"))
    named = parse_recipe("rules: [{match: linear, format: mxfp4_hadamard, if_not_divisible: keep}]", "t", "t")
    run(MODEL, tmp_path / "b", named)
    a, b = (hashes(tmp_path / name) for name in "ab")
    assert a["model.safetensors"] == b["model.safetensors"] and a["config.json"] == b["config.json"]


def test_weights_without_a_hessian_get_the_hadamard_matrix_and_the_plan_says_so(statistics: Path) -> None:
    rules = "rules: [{match: [linear, mtp.mlp, mtp.experts, mtp.attention], optional: true, format: mxfp4, "
    recipe = parse_recipe(rules + "transform: duquant, if_not_divisible: keep}]", "t", "t")
    plan = halfbyte.plan(MODEL, recipe, importance=statistics)
    assert plan.calibration_use is not None and plan.calibration_use.rotated_by_inputs
    assert "mtp.layers.0.self_attn.o_proj.weight" in plan.calibration_use.rotated_by_hadamard
    assert any("rotated by the Hadamard matrix" in note for note in plan.notes)


def test_importance_weighs_nothing_that_is_rotated(statistics: Path) -> None:
    recipe = asking("hadamard")
    with pytest.raises(PlanError, match="changes nothing"):
        halfbyte.plan(MODEL, recipe, importance=statistics)


def test_duquant_without_a_calibration_is_refused_or_left_out(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`transform: duquant`, which needs a calibration"):
        halfbyte.plan(MODEL, asking("duquant"))
    text = "calibration: optional\nrules: [{match: linear, format: mxfp4, transform: duquant, if_not_divisible: keep}]"
    plan = halfbyte.plan(MODEL, parse_recipe(text, "t", "t"))
    assert any("the Hadamard matrix takes their place" in note for note in plan.notes)


def test_duquant_with_importance_alone_is_refused(tmp_path: Path) -> None:
    folder = invented_statistics(tmp_path / "s", hessians=False)
    with pytest.raises(RecipeError, match="holds no Hessians"):
        halfbyte.plan(MODEL, asking("duquant"), importance=folder)


@pytest.mark.parametrize(
    ("dialect", "transform", "message"),
    [
        ("compressed-tensors", "hadamard", "rotate no inputs of experts"),
        ("compressed-tensors", "duquant", "no spelling for mxfp4_duquant"),
        ("modelopt", "hadamard", "mxfp4_hadamard"),
        ("mlx", "hadamard", "mxfp4_hadamard"),
        ("gguf", "hadamard", "mxfp4_hadamard|GGUF|gguf"),
    ],
)
def test_dialects_without_a_word_for_a_rotation_refuse_it(
    dialect: str, transform: str, message: str, statistics: Path, tmp_path: Path
) -> None:
    match = "experts" if "experts" in message else "attention"
    rule = f"{{match: {match}, format: mxfp4, transform: {transform}, if_not_divisible: keep}}"
    known = {"importance": statistics} if transform == "duquant" else {}
    with pytest.raises(PlanError, match=message):
        halfbyte.plan(MODEL, parse_recipe(f"rules: [{rule}]", "t", "t"), dialect=dialect, **known)


def test_a_rotated_checkpoint_becomes_a_plain_one(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", moe_tensors(), MOE_CONFIG)
    run(source, tmp_path / "rotated", asking("hadamard"))
    plan = run(tmp_path / "rotated", tmp_path / "plain", PLAIN)
    assert not any(i.action == "transcode" and "experts" in i.weight.role and i.format for i in plan.items)
    assert halfbyte.verify(tmp_path / "plain", tmp_path / "rotated").ok


def test_rotated_weights_keep_their_codes_in_another_dialect_and_come_back(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG)
    run(source, tmp_path / "a", asking("hadamard"))
    halfbyte.convert(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    halfbyte.convert(tmp_path / "b", tmp_path / "c", "halfbyte")
    checked = halfbyte.verify(tmp_path / "b", tmp_path / "a")
    assert checked.ok and checked.lossless == checked.quantized == 14
    first, last = read_file(tmp_path / "a"), read_file(tmp_path / "c")
    assert first.keys() == last.keys() and all(first[n].tobytes() == last[n].tobytes() for n in first)


@pytest.mark.slow
def test_a_damaged_rotation_is_found(statistics: Path, tmp_path: Path) -> None:
    convert(halfbyte.plan(MODEL, asking("duquant"), importance=statistics), tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    info = next(t for name, t in out.inventory.tensors.items() if name.endswith("_rotation"))
    path = tmp_path / "out" / info.file
    content = bytearray(path.read_bytes())
    content[info.offset : info.offset + info.nbytes] = bytes([7] * info.nbytes)
    path.write_bytes(content)
    assert not halfbyte.verify(tmp_path / "out", MODEL).ok


def test_stored_steps_are_counted_in_the_plan(statistics: Path) -> None:
    plain = halfbyte.plan(MODEL, asking("hadamard"))
    turned = halfbyte.plan(MODEL, asking("duquant"), importance=statistics)
    item = next(i for i in turned.items if i.format and len(i.weight.shape) == 3)
    assert item.format == get_format("mxfp4_duquant")
    assert [o.shape for o in item.outputs if o.part == "rotation"] == [
        (item.weight.shape[0], item.weight.shape[2] // 32, 16)
    ]
    assert turned.data_bytes > plain.data_bytes
