"""Conversions with AWQ folding: what is kept is scaled exactly, and verify proves it without the importance file."""

from __future__ import annotations

import json
import shutil
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.test_interrupted import SHARD_BYTES, start
from folded import AWQ, importance_of, plan_with
from halfbyte.calibration import write_importance
from halfbyte.convert.conversion import convert
from halfbyte.errors import OutputError
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.smoothing import SMOOTHING_FILE, read_scales
from halfbyte.verify.weights import verify
from small_models import (
    DENSE_CONFIG,
    MOE_CONFIG,
    dense_tensors,
    hashes,
    linear,
    moe_tensors,
    read_file,
    recipe,
    without_checksums,
    write_checkpoint,
    write_file,
)

DIALECTS = ["halfbyte", "compressed-tensors"]
TEXT = "model.language_model.layers.1."


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG, shards=2)


@pytest.fixture(scope="module")
def folded(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted in the dialect halfbyte; tests must not change it."""
    out = tmp_path_factory.mktemp("folded") / "out"
    done = convert(plan_with(moe), out, threads=1)
    assert all(entry.alpha > 0 and entry.loss < entry.unfolded for entry in done.smoothings)
    return out


@pytest.fixture
def copy(folded: Path, tmp_path: Path) -> Path:
    return without_checksums(Path(shutil.copytree(folded, tmp_path / "copy")))


def change(out: Path, name: str, by: float = 1.5) -> None:
    """Multiply a tensor of an output."""
    tensors = read_file(out)
    tensors[name] = (tensors[name].astype(np.float32) * by).astype(tensors[name].dtype)
    write_file(out / "model.safetensors", tensors)


def problems(out: Path, source: Path) -> list[str]:
    return verify(out, source).problems


def test_every_group_of_the_main_model_is_folded_and_no_other(moe: Path, folded: Path) -> None:
    scales = read_scales(folded / SMOOTHING_FILE)
    assert sorted(name.removeprefix("model.language_model.layers.") for name in scales) == [
        "0.input_layernorm.weight",
        "0.mlp.experts.gate_up_proj",
        "0.mlp.shared_expert.up_proj.weight",
        "0.post_attention_layernorm.weight",
        "1.input_layernorm.weight",
        "1.mlp.experts.gate_up_proj",
        "1.mlp.shared_expert.up_proj.weight",
        "1.post_attention_layernorm.weight",
    ]


def test_a_zero_centred_norm_and_what_reads_it_keep_their_product(moe: Path, folded: Path) -> None:
    before, after = read_file(moe), read_file(folded)
    norm, router = f"{TEXT}post_attention_layernorm.weight", f"{TEXT}mlp.gate.weight"
    assert not np.array_equal(before[norm], after[norm])
    products = [(1 + t[norm].astype(np.float64)) * t[router].astype(np.float64) for t in (before, after)]
    np.testing.assert_allclose(products[1], products[0], rtol=2**-8)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("per_expert", [False, True])
def test_verify_accepts_it_without_the_importance_file(tmp_path: Path, dialect: str, per_expert: bool) -> None:
    source = write_checkpoint(tmp_path / "source", moe_tensors(per_expert), MOE_CONFIG)
    plan = plan_with(source, dialect=dialect)
    convert(plan, tmp_path / "out")
    found = verify(tmp_path / "out", source)
    assert found.problems == [] and found.smoothed > 20
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written == plan.repository_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("dialect", "fmt"), [("mlx", "affine4_g32"), ("gguf", "q4_0")])
def test_dialects_that_respell_kept_weights_write_the_folded_ones(
    shared: Path, tmp_path: Path, dialect: str, fmt: str
) -> None:
    pytest.importorskip("gguf")
    source = shared / "data" / "models" / "qwen3-tiny-wiki"
    some = ["attention.q", "attention.k", "attention.v", "mlp.down"]
    what = recipe({"match": some, "format": fmt, "scale_search": "absmax", "transform": "awq"})
    done = convert(plan_with(source, what, dialect), tmp_path / "out")
    found = verify(tmp_path / "out", source)
    assert found.problems == [] and found.smoothed == 36 and all(fold.alpha > 0 for fold in done.smoothings)


def test_both_spellings_of_experts_are_folded_alike(moe: Path, folded: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", moe_tensors(per_expert=True), MOE_CONFIG)
    convert(plan_with(source), tmp_path / "out")
    one, other = read_file(folded), read_file(tmp_path / "out")
    assert {name for name in one if name in other and one[name].tobytes() != other[name].tobytes()} == set()
    assert sum("experts" in name for name in one if name in other) > 10


@pytest.mark.slow
def test_kept_experts_are_folded_in_the_shape_that_they_have(tmp_path: Path) -> None:
    only_down = recipe(
        {"match": "shared_expert", "format": "int4_g32", "scale_search": "absmax", "transform": "awq"},
        {"match": "experts.down", "format": "int4_g32", "scale_search": "absmax", "transform": "awq"},
    )
    for per_expert in (False, True):
        source = write_checkpoint(tmp_path / f"source-{per_expert}", moe_tensors(per_expert), MOE_CONFIG)
        convert(plan_with(source, only_down), tmp_path / f"out-{per_expert}")
        found = verify(tmp_path / f"out-{per_expert}", source)
        assert found.problems == []
        before, after = read_file(source), read_file(tmp_path / f"out-{per_expert}")
        name = f"{TEXT}mlp.experts.{'0.up_proj.weight' if per_expert else 'gate_up_proj'}"
        assert before[name].shape == after[name].shape and before[name].tobytes() != after[name].tobytes()


def test_the_bytes_depend_neither_on_threads_nor_on_memory(moe: Path, folded: Path, tmp_path: Path) -> None:
    convert(plan_with(moe), tmp_path / "out", threads=3, memory=1 << 22)
    assert hashes(tmp_path / "out") == hashes(folded)


@pytest.fixture(scope="module")
def importance(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("importance") / "importance.safetensors"
    write_importance(importance_of(moe), path)
    return path


@pytest.fixture(scope="module")
def uninterrupted(moe: Path, importance: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    out = tmp_path_factory.mktemp("whole") / "out"
    child = start(moe, out, importance=importance)
    text, errors = child.communicate()
    assert child.returncode == 0, errors
    return hashes(out), int(text)


# the first calls write the scales
@pytest.mark.slow
@pytest.mark.parametrize("call", [2, 5, 9, 14, 17, 30])
def test_a_killed_conversion_continues_to_the_same_bytes(
    moe: Path, tmp_path: Path, importance: Path, uninterrupted: tuple[dict[str, str], int], call: int
) -> None:
    out = tmp_path / "out"
    child = start(moe, out, call, importance=importance)
    child.communicate()
    assert child.returncode == -signal.SIGKILL and (out / ".halfbyte").exists()
    child = start(moe, out, importance=importance)
    child.communicate()
    assert child.returncode == 0 and hashes(out) == uninterrupted[0]


def test_finished_scales_are_taken_over(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(count: int) -> None:
        if (tmp_path / "out" / SMOOTHING_FILE).exists():
            raise KeyboardInterrupt

    plan = plan_with(moe, max_shard_bytes=SHARD_BYTES)
    with pytest.raises(KeyboardInterrupt):
        convert(plan, tmp_path / "out", threads=1, progress=interrupted)
    monkeypatch.setattr(import_module("halfbyte.convert.smoothing_search"), "choose_scale", None)
    done = convert(plan, tmp_path / "out", threads=1)
    assert len(done.smoothings) == 8 and problems(tmp_path / "out", moe) == []


def test_another_importance_file_does_not_continue_a_conversion(moe: Path, tmp_path: Path) -> None:
    def interrupted(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan_with(moe), tmp_path / "out", threads=1, progress=interrupted)
    with pytest.raises(OutputError, match="unfinished output of another conversion"):
        convert(plan_with(moe, seed=1), tmp_path / "out")


@pytest.mark.parametrize("ending", ["mlp.gate.weight", "mlp.shared_expert_gate.weight"])
def test_a_kept_weight_that_was_not_scaled_is_found(moe: Path, copy: Path, ending: str) -> None:
    tensors, name = read_file(copy), TEXT + ending
    tensors[name] = read_file(moe)[name]
    write_file(copy / "model.safetensors", tensors)
    assert problems(copy, moe) == [f"{name} is not what the source gives with the scales in {SMOOTHING_FILE}"]


def test_a_norm_that_was_not_divided_is_found(moe: Path, copy: Path) -> None:
    name = f"{TEXT}input_layernorm.weight"
    change(copy, name)
    assert problems(copy, moe) == [f"{name} is not what the source gives with the scales in {SMOOTHING_FILE}"]


def test_a_quantized_weight_of_another_scale_is_found(moe: Path, copy: Path) -> None:
    change(copy, f"{TEXT}mlp.shared_expert.down_proj.weight_tensor_scale")
    assert len(problems(copy, moe)) == 1 and "relative error" in problems(copy, moe)[0]


def test_missing_scales_are_found(moe: Path, copy: Path) -> None:
    (copy / SMOOTHING_FILE).unlink()
    found = problems(copy, moe)
    assert (
        found[0] == f"{SMOOTHING_FILE} is missing, so what was smoothed in the weights cannot be checked"
        and len(found) > 5
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"x", "is truncated"),
        ({"model.language_model.layers.1.input_layernorm.weight": np.ones(3, np.float32)}, "a scale of shape [3]"),
        ({"model.language_model.norm.weight": np.ones(128, np.float32)}, "cannot be smoothed in this source"),
        ({"model.language_model.layers.1.input_layernorm.weight": np.zeros(128, np.float32)}, "finite and positive"),
    ],
)
def test_damaged_scales_are_a_problem_and_no_crash(moe: Path, copy: Path, content: Any, problem: str) -> None:
    from halfbyte.checkpoint import build_header

    if isinstance(content, dict):
        planned = build_header(
            [(n, "F32", a.shape) for n, a in content.items()], {"format": "halfbyte-folds", "version": "1"}
        )
        content = planned.header + b"".join(a.tobytes() for a in content.values())
    (copy / SMOOTHING_FILE).write_bytes(content)
    assert any(problem in found for found in problems(copy, moe))


def test_errors_of_tensors_are_measured_after_folding(moe: Path, folded: Path) -> None:
    pytest.importorskip("torch")
    from halfbyte.evaluate.errors_document import tensor_errors

    assert tensor_errors(folded, moe)["total"]["relmse"] < 0.02


def test_scales_do_not_travel_on_when_a_folded_checkpoint_is_converted_again(folded: Path, tmp_path: Path) -> None:
    plan = make_plan(Checkpoint.open(folded), linear("int4_g32"), "halfbyte")
    convert(plan, tmp_path / "out")
    assert not (tmp_path / "out" / SMOOTHING_FILE).exists() and problems(tmp_path / "out", folded) == []


def test_where_folding_does_not_pay_nothing_changes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG)
    flat = importance_of(source, spread=0)
    from halfbyte.api import quantize

    done = quantize(source, tmp_path / "out", AWQ, importance=flat)
    assert done.smoothings and all(entry.alpha == 0 for entry in done.smoothings)
    found = verify(tmp_path / "out", source)
    assert found.ok and found.smoothed == 0
    assert json.loads((tmp_path / "out" / "halfbyte.json").read_text())["folds"] == SMOOTHING_FILE
