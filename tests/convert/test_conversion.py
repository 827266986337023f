from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.checkpoint import Journal, Reader
from halfbyte.convert.conversion import Conversion, convert, source_bytes
from halfbyte.formats import get_format
from halfbyte.plan import resources as slices
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.search import encode
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import (
    DENSE_CONFIG,
    MOE_CONFIG,
    SIDE_FILES,
    Tensors,
    dense_tensors,
    hashes,
    heavy_tailed,
    linear,
    moe_tensors,
    read_file,
    run,
    write_checkpoint,
    write_file,
)

DIALECTS = ["halfbyte", "compressed-tensors"]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG, shards=3)


def converted(source: Path, out: Path, what: Any, dialect: str = "halfbyte", **more: Any) -> tuple[Plan, Conversion]:
    plan = make_plan(Checkpoint.open(source), what, dialect, **more)
    return plan, convert(plan, out, threads=1)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_file_has_exactly_the_planned_bytes(moe: Path, tmp_path: Path, dialect: str) -> None:
    plan = run(moe, tmp_path / "out", linear("nvfp4"), dialect, max_shard_bytes=100_000)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    wanted = {shard.name: shard.layout.total for shard in plan.shards}
    wanted |= {"config.json": len(plan.config), "halfbyte.json": len(plan.provenance)}
    wanted |= {"model.safetensors.index.json": len(plan.index or b"")} | {n: len(c) for n, c in SIDE_FILES.items()}
    assert sizes == wanted and len(plan.shards) > 5
    for shard in plan.shards:
        assert (tmp_path / "out" / shard.name).read_bytes().startswith(shard.layout.header)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_worker_and_many_give_the_same_bytes(moe: Path, tmp_path: Path, dialect: str) -> None:
    for threads in (1, 5):
        run(moe, tmp_path / str(threads), linear("mixfp4"), dialect, max_shard_bytes=200_000, threads=threads)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "5")


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fmt", ["nvfp4", "int4_g32", "int4_asym_g32", "fp8_tensor", "fp8_channel", "fp8_block128"])
def test_the_size_of_slices_does_not_change_a_byte(
    moe: Path, tmp_path: Path, fmt: str, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # also through what is quantized already, which is read back in slices
    run(moe, tmp_path / "large", linear(fmt), dialect)
    run(tmp_path / "large", tmp_path / "large again", linear("mxfp8"), dialect)
    monkeypatch.setattr(slices, "SLICE_BYTES", 64)
    run(moe, tmp_path / "small", linear(fmt), dialect)
    run(tmp_path / "small", tmp_path / "small again", linear("mxfp8"), dialect)
    assert hashes(tmp_path / "large")["model.safetensors"] == hashes(tmp_path / "small")["model.safetensors"]
    assert read_file(tmp_path / "large again").keys() == read_file(tmp_path / "small again").keys()
    again = [hashes(tmp_path / f"{size} again")["model.safetensors"] for size in ("large", "small")]
    assert again[0] == again[1]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fmt", ["nvfp4", "int4_asym_g64", "fp8_block128"])
def test_both_spellings_of_experts_give_the_same_quantized_tensors(
    moe: Path, tmp_path: Path, fmt: str, dialect: str
) -> None:
    other = write_checkpoint(tmp_path / "per expert", moe_tensors(per_expert=True), MOE_CONFIG)
    plan = run(moe, tmp_path / "a", linear(fmt), dialect)
    run(other, tmp_path / "b", linear(fmt), dialect)
    a, b = read_file(tmp_path / "a"), read_file(tmp_path / "b")
    names = [o.name for item in plan.items if item.format for o in item.outputs]
    assert len(names) > 10 and all(a[name].tobytes() == b[name].tobytes() for name in names)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_kept_tensors_and_side_files_are_copied_bit_for_bit(moe: Path, tmp_path: Path, dialect: str) -> None:
    plan = run(moe, tmp_path / "out", linear("nvfp4"), dialect)
    before, after = moe_tensors(), read_file(tmp_path / "out")
    kept = [source for item in plan.items if item.action == "keep" for source in item.weight.sources]
    assert kept and all(before[name].tobytes() == after[name].tobytes() for name in kept)
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in SIDE_FILES.items())


def test_tensors_of_every_dtype_and_shape_are_kept(tmp_path: Path) -> None:
    strange: Tensors = {
        "model.a": np.array(3.5, np.float32),
        "model.b": np.zeros((0, 4), ml_dtypes.bfloat16),
        "model.c": np.array([True, False]),
        "model.d": np.arange(6, dtype=np.int64).reshape(1, 2, 3),
        "model.e": np.arange(8, dtype=np.uint8).view(ml_dtypes.float8_e5m2),
        "model.f": np.array([1.5], np.float64),
    }
    source = write_checkpoint(tmp_path / "source", dense_tensors() | strange, DENSE_CONFIG)
    run(source, tmp_path / "out", linear("nvfp4"))
    after = read_file(tmp_path / "out")
    assert all(after[n].dtype == a.dtype and after[n].tobytes() == a.tobytes() for n, a in strange.items())
    assert verify(tmp_path / "out", source).problems == []


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_wider_floats_are_quantized_as_they_are(tmp_path: Path, dtype: type) -> None:
    tensors = {name: array.astype(dtype) for name, array in dense_tensors().items()}
    source = write_checkpoint(tmp_path / "source", tensors, DENSE_CONFIG)
    run(source, tmp_path / "out", linear("int4_g32"))
    name = "model.layers.0.mlp.down_proj.weight"
    wanted = encode(tensors[name].astype(np.float32), "int4_g32", "absmax")
    assert read_file(tmp_path / "out")[f"{name}_codes"].tobytes() == wanted.codes.tobytes()


def test_experts_that_lie_transposed_and_interleaved_are_quantized_along_k(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prefix = "model.layers.0.mlp.experts."
    tensors: Tensors = {
        f"{prefix}gate_up_proj": heavy_tailed(rng, 2, 64, 256),
        f"{prefix}gate_up_proj_bias": heavy_tailed(rng, 2, 256),
        f"{prefix}down_proj": heavy_tailed(rng, 2, 128, 64),
    }
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 64}
    source = write_checkpoint(tmp_path / "source", tensors, config)
    run(source, tmp_path / "out", linear("nvfp4"))
    stored = read_file(tmp_path / "out")
    upright = np.ascontiguousarray(tensors[f"{prefix}gate_up_proj"].swapaxes(1, 2))
    assert stored[f"{prefix}gate_up_proj_codes"].shape == (2, 256, 32)
    assert stored[f"{prefix}gate_up_proj_codes"].tobytes() == encode(upright, "nvfp4", "absmax").codes.tobytes()
    assert verify(tmp_path / "out", source).problems == []


def test_square_transposed_experts_are_not_transposed_again_when_they_are_read_back(tmp_path: Path) -> None:
    tensors: Tensors = {"model.layers.0.mlp.experts.down_proj": heavy_tailed(np.random.default_rng(0), 2, 64, 64)}
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 64}
    source = write_checkpoint(tmp_path / "source", tensors, config)
    run(source, tmp_path / "first", linear("nvfp4"))
    run(tmp_path / "first", tmp_path / "second", linear("fp8_channel"))
    assert verify(tmp_path / "second", tmp_path / "first").problems == []
    assert verify(tmp_path / "second", source).problems == []


def test_the_error_of_every_weight_is_measured_over_all_its_elements(moe: Path, tmp_path: Path) -> None:
    plan, done = converted(moe, tmp_path / "out", linear("nvfp4"))
    assert [e.name for e in done.errors] == [i.weight.name for i in plan.items if i.format]
    ours, tensors = Checkpoint.open(tmp_path / "out"), moe_tensors()
    weights = {w.name: w for w in ours.weights}
    with Reader(ours.inventory) as reader:
        for error in done.errors:
            dense = tensors[error.name].astype(np.float64)
            difference = ours.read(reader, weights[error.name]).astype(np.float64) - dense
            assert error.elements == dense.size and error.format == "nvfp4"
            assert error.relmse == pytest.approx((difference**2).sum() / (dense**2).sum(), rel=1e-5)
            assert error.max_error == pytest.approx(np.abs(difference).max(), rel=1e-5)
    assert 0.005 < done.relmse < 0.02


def test_the_choices_of_mixfp4_are_counted_per_block(moe: Path, tmp_path: Path) -> None:
    _, done = converted(moe, tmp_path / "out", linear("mixfp4"))
    for error in done.errors:
        assert sum(error.codebook_blocks) == error.elements // 16 and min(error.codebook_blocks) > 0


@pytest.mark.parametrize("dialect", DIALECTS)
def test_progress_adds_up_to_the_bytes_of_the_source(moe: Path, dialect: str, tmp_path: Path) -> None:
    plan = make_plan(Checkpoint.open(moe), linear("nvfp4"), dialect, 100_000)
    calls: list[int] = []
    convert(plan, tmp_path / "out", threads=2, progress=calls.append)
    assert sum(calls) == source_bytes(plan) == plan.checkpoint.inventory.total_bytes


def test_progress_adds_up_in_slices_too(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", 1000)
    plan, calls = make_plan(Checkpoint.open(moe), linear("nvfp4")), list[int]()
    convert(plan, tmp_path / "out", threads=1, progress=calls.append)
    assert sum(calls) == source_bytes(plan) and len(calls) > len(plan.items)


def test_a_tensor_scale_is_a_power_of_two_where_the_rule_says_so(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4", global_scale="power_of_two"), "compressed-tensors")
    scales = [a for n, a in read_file(tmp_path / "out").items() if n.endswith("weight_global_scale")]
    assert scales and all(np.frexp(scale)[0] == 0.5 for scale in scales)


def test_zero_weights_and_experts_decode_to_zeros(tmp_path: Path) -> None:
    tensors = moe_tensors()
    tensors["model.language_model.layers.0.mlp.experts.down_proj"][1] = 0
    tensors["model.language_model.layers.0.linear_attn.out_proj.weight"][:] = 0
    source = write_checkpoint(tmp_path / "source", tensors, MOE_CONFIG)
    for dialect in DIALECTS:
        for fmt in ("nvfp4", "mixfp4", "int4_asym_g32", "fp8_tensor"):
            run(source, tmp_path / dialect / fmt, linear(fmt), dialect)
            assert verify(tmp_path / dialect / fmt, source).problems == []


def test_the_output_says_where_it_comes_from_without_a_path_of_this_machine(moe: Path, tmp_path: Path) -> None:
    plan = run(moe, tmp_path / "out", linear("nvfp4"))
    told = json.loads((tmp_path / "out" / "halfbyte.json").read_text())
    assert told["source"]["name"] == "moe" and told["source"]["fingerprint"] == plan.checkpoint.inventory.fingerprint
    assert told["recipe"]["rules"][0]["format"] == "nvfp4" and told["dialect"] == "halfbyte"
    assert str(tmp_path) not in (tmp_path / "out" / "halfbyte.json").read_text()


@pytest.fixture
def steps(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What a conversion to ``tmp_path/out`` does, in order: files get their names, and the journal records them."""
    seen: list[tuple[str, str]] = []
    replace, record = os.replace, Journal.record

    def named(source: Path, target: Path) -> None:
        replace(source, target)
        seen.append(("named", Path(target).name))

    def recorded(journal: Journal, filename: str, *args: Any) -> None:
        seen.append(("recorded", filename))
        record(journal, filename, *args)

    monkeypatch.setattr(os, "replace", named)
    monkeypatch.setattr(Journal, "record", recorded)
    run(moe, tmp_path / "out", linear("nvfp4"), "compressed-tensors", max_shard_bytes=100_000)
    return seen


def test_the_journal_records_a_file_only_once_it_has_its_name(steps: list[tuple[str, str]]) -> None:
    recorded = [name for step, name in steps if step == "recorded"]
    assert len(recorded) > 5 and all(name.endswith(".safetensors") for name in recorded)
    assert all(steps.index(("named", name)) < steps.index(("recorded", name)) for name in recorded)


def test_config_json_comes_last_so_that_a_folder_with_it_is_complete(steps: list[tuple[str, str]]) -> None:
    named = [name for step, name in steps if step == "named"]
    assert named[-3:] == ["model.safetensors.index.json", "halfbyte.json", "config.json"]
    assert set(SIDE_FILES) < set(named[:-3]) and len(named) == len(set(named))


def test_saturated_elements_of_all_slices_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, name = dense_tensors(), "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.zeros((256, 128), ml_dtypes.bfloat16)
    # E8M0 rounds the scale 7/6 down to 1, so that each 7 lies above the largest value, 6
    tensors[name][[0, 100, 255], 5] = 7
    source = write_checkpoint(tmp_path / "source", tensors, DENSE_CONFIG)
    monkeypatch.setattr(slices, "SLICE_BYTES", 64)
    _, done = converted(source, tmp_path / "out", linear("mxfp4"))
    assert next(e for e in done.errors if e.name == name).saturated == 3


def test_a_lone_file_without_a_config_is_converted_too(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_file(tmp_path / "source" / "some.safetensors", dense_tensors())
    plan = run(tmp_path / "source" / "some.safetensors", tmp_path / "out", linear("nvfp4"))
    assert any("names no architecture" in note for note in plan.notes)
    assert get_format("nvfp4") in Checkpoint.open(tmp_path / "out").formats.values()
