"""What modelopt itself exported and decoded (tests/golden/modelopt.json) is read; what is written has its layout."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.streams import digests, random_bytes
from halfbyte.checkpoint import Inventory, numpy_dtype
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from quantized_sources import values
from small_models import (
    MOE_CONFIG,
    linear,
    moe_tensors,
    read_file,
    recipe,
    run,
    write_checkpoint,
)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent.parent / "golden" / "modelopt.json").read_text())
EXPORTS: dict[str, Any] = GOLDEN["exports"]
FORMATS = {
    "nvfp4_experts": {"nvfp4"},
    "nvfp4_weights": {"nvfp4"},
    "fp8": {"fp8_tensor"},
    "fp8_channel": {"fp8_channel"},
    "fp8_block": {"fp8_block128"},
    "mxfp8": {"mxfp8"},
    "mxfp4": {"mxfp4"},
    "mixed": {"nvfp4", "fp8_tensor"},
}


def content(dtype: str, shape: list[int], seed: int) -> np.ndarray:
    """Random values that are finite in every layout."""
    if dtype in ("BF16", "F32"):
        return np.random.RandomState(seed).uniform(0.001, 0.002, shape).astype(numpy_dtype(dtype))
    raw = random_bytes(tuple(shape), seed, 1, 127)
    return raw.view(numpy_dtype(dtype)) if dtype != "U8" else raw


def exported(folder: Path, key: str, **changes: Any) -> Path:
    """A checkpoint with names, shapes and configuration of one of modelopt's, and random content."""
    export = EXPORTS[key]
    found = {name: content(dtype, shape, seed) for seed, (name, (dtype, shape)) in enumerate(export["tensors"].items())}
    for name in found:
        if name.endswith(("weight_scale_2", "input_scale")):
            found[name] = np.float32(0.002).reshape(())
        elif name.endswith("weight_scale") and found[name].shape == ():
            found[name] = np.float32(0.001).reshape(())
    config = {"model_type": export["model_type"], "quantization_config": export["quantization_config"], **changes}
    write_checkpoint(folder, found, config)
    (folder / "hf_quant_config.json").write_text(json.dumps(export["hf_quant_config"]))
    return folder


@pytest.mark.parametrize("name", GOLDEN["decode"])
def test_random_bytes_decode_as_in_modelopt(name: str) -> None:
    fmt, scale = get_format(name), None
    codes = random_bytes((64, 256), 20)
    if name not in ("nvfp4", "mxfp4"):
        codes = random_bytes((64, 512), 21)
        codes[(codes & 127) == 127] = 0
    wide = random_bytes((64, 4), 24, 1, 255).astype(np.float32) / np.float32(1000)
    scales: np.ndarray = random_bytes((64, 16), 23, 20, 220)
    if name == "nvfp4":
        scales, scale = random_bytes((64, 32), 22, 1, 127), wide[0, 0]
    elif name.startswith("fp8"):
        scales = {"fp8_tensor": wide[:1, :1], "fp8_channel": wide[:, :1], "fp8_block128": wide[:1]}[name]
    decoded = QuantizedTensor(fmt, (64, 512), codes, scales, scale).decode()
    assert digests(decoded + np.float32(0)) == GOLDEN["decode"][name]


@pytest.mark.parametrize("key", EXPORTS)
def test_exports_of_modelopt_are_read(tmp_path: Path, key: str) -> None:
    source = exported(tmp_path / "source", key)
    checkpoint = Checkpoint.open(source)
    assert checkpoint.dialect is not None and checkpoint.dialect.name == "modelopt"
    assert {fmt.name for fmt in checkpoint.formats.values()} == FORMATS[key]
    names = {name.rpartition(".")[0] for name in EXPORTS[key]["tensors"] if name.endswith("weight_scale")}
    sources = {s.removesuffix(".weight") for w in checkpoint.weights if w.name in checkpoint.formats for s in w.sources}
    assert sources == names
    assert all(np.isfinite(array).all() and array.any() for array in values(source).values())


def test_nvfp4_experts_are_decoded_with_their_own_scales(tmp_path: Path) -> None:
    source = exported(tmp_path / "source", "nvfp4_experts")
    stored, found = read_file(source), values(source)
    prefix = "model.layers.0.mlp.experts"
    for expert in (0, 1):
        for rows, part in ((slice(0, 64), "gate_proj"), (slice(64, 128), "up_proj")):
            name = f"{prefix}.{expert}.{part}.weight"
            tensor = QuantizedTensor(
                get_format("nvfp4"),
                (64, 64),
                stored[name],
                stored[f"{name}_scale"].view(np.uint8),
                stored[f"{name}_scale_2"],
            )
            assert np.array_equal(found[f"{prefix}.gate_up_proj"][expert, rows], tensor.decode())


def test_checkpoints_with_the_extra_file_alone_are_read(tmp_path: Path) -> None:
    source = exported(tmp_path / "source", "mixed")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    assert {fmt.name for fmt in Checkpoint.open(source).formats.values()} == {"nvfp4", "fp8_tensor"}


def test_an_algorithm_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    settings = {**EXPORTS["nvfp4_weights"]["quantization_config"], "quant_algo": "W4A16_AWQ"}
    source = exported(tmp_path / "source", "nvfp4_weights", quantization_config=settings)
    with pytest.raises(CheckpointError, match=r"down_proj in .* has the algorithm 'W4A16_AWQ'"):
        Checkpoint.open(source)


def test_smoothed_weights_are_refused(tmp_path: Path) -> None:
    source = exported(tmp_path / "source", "nvfp4_weights")
    stored = read_file(source)
    stored["model.layers.0.self_attn.o_proj.pre_quant_scale"] = np.ones(64, np.float32)
    other = write_checkpoint(tmp_path / "other", stored, json.loads((source / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=r"o_proj\.weight in .* is smoothed \(pre_quant_scale\)"):
        Checkpoint.open(other)


def test_a_packed_weight_without_scales_is_an_error(tmp_path: Path) -> None:
    source = exported(tmp_path / "source", "nvfp4_weights")
    stored = read_file(source)
    del stored["model.layers.0.self_attn.o_proj.weight_scale"]
    other = write_checkpoint(tmp_path / "other", stored, json.loads((source / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=r"o_proj\.weight \(U8\) in .* has no .*o_proj\.weight_scale beside it"):
        Checkpoint.open(other)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "source", moe_tensors(), MOE_CONFIG)


@pytest.mark.parametrize("fmt", ["nvfp4", "fp8_channel", "fp8_block128", "mxfp8"])
def test_written_tensors_have_modelopts_names_types_and_shapes(moe: Path, tmp_path: Path, fmt: str) -> None:
    run(moe, tmp_path / "out", linear(fmt), "modelopt")
    tensors = Inventory.open(tmp_path / "out").tensors
    module = "model.language_model.layers.1.mlp.experts.3.up_proj.weight"
    found = {name.removeprefix(module): (t.dtype, t.shape) for name, t in tensors.items() if name.startswith(module)}
    expected = {
        "nvfp4": {"": ("U8", (128, 64)), "_scale": ("F8_E4M3", (128, 8)), "_scale_2": ("F32", ())},
        "fp8_channel": {"": ("F8_E4M3", (128, 128)), "_scale": ("F32", (128,))},
        "fp8_block128": {"": ("F8_E4M3", (128, 128)), "_scale": ("F32", (1, 1, 1, 1))},
        "mxfp8": {"": ("F8_E4M3", (128, 128)), "_scale": ("U8", (128, 4))},
    }
    assert found == expected[fmt]
    assert verify(tmp_path / "out", moe).problems == []


def test_one_format_is_one_algorithm_and_a_list_of_what_is_left_out(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), "modelopt")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "modelopt" and config["quant_algo"] == "W4A16_NVFP4" and config["group_size"] == 16
    assert config["config_groups"]["group_0"]["input_activations"] is None
    extra = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert extra["quant_algo"] == "W4A16_NVFP4" and extra["group_size"] == 16
    assert extra["kv_cache_quant_algo"] is None and extra["exclude_modules"] == config["ignore"]
    checkpoint = Checkpoint.open(tmp_path / "out")
    for weight in checkpoint.weights:
        if len(weight.shape) in (2, 3) and "conv1d" not in weight.name and "embed" not in weight.name:
            for source in weight.sources:
                module = source.removesuffix(".weight")
                left_out = any(fnmatch(module, pattern) for pattern in config["ignore"])
                assert left_out == (weight.name not in checkpoint.formats), module


def test_several_formats_are_a_map_of_modules(moe: Path, tmp_path: Path) -> None:
    rules = recipe(
        {"match": "linear", "format": "fp8_channel", "scale_search": "absmax"},
        {"match": "experts", "format": "nvfp4", "scale_search": "absmax"},
    )
    run(moe, tmp_path / "out", rules, "modelopt")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    layers = config["quantized_layers"]
    text = "model.language_model.layers.1"
    assert layers[f"{text}.mlp.experts.0.down_proj"] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert layers[f"{text}.self_attn.q_proj"] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    extra = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert extra["quantized_layers"] == layers
    tensors = Inventory.open(tmp_path / "out").tensors
    assert set(layers) == {name.rpartition(".")[0] for name in tensors if name.endswith("weight_scale")}
    assert verify(tmp_path / "out", moe).problems == []


@pytest.mark.parametrize(
    ("fmt", "message"),
    [("fp8_tensor", "calibrated input scales only; choose fp8_channel"), ("mxfp4", "no spelling for mxfp4")],
)
def test_formats_that_engines_would_misread_are_refused(moe: Path, fmt: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(Checkpoint.open(moe), linear(fmt), "modelopt")


def test_the_configuration_says_w4a4_where_input_scales_are_kept(tmp_path: Path) -> None:
    source = exported(tmp_path / "source", "nvfp4_experts")
    plan = run(source, tmp_path / "out", linear("nvfp4"), "modelopt")
    before, after = read_file(source), read_file(tmp_path / "out")
    assert {n: a.tobytes() for n, a in before.items()} == {n: a.tobytes() for n, a in after.items()}
    assert json.loads(plan.config)["quantization_config"]["quant_algo"] == "NVFP4"
    assert json.loads(plan.extra_files["hf_quant_config.json"])["quantization"]["quant_algo"] == "NVFP4"


def test_input_scales_are_left_out_where_activations_are_not_quantized(tmp_path: Path) -> None:
    source = exported(tmp_path / "source", "nvfp4_experts")
    plan = run(source, tmp_path / "out", linear("mxfp4"), "compressed-tensors")
    assert any("scales of activations are left out (10)" in note for note in plan.notes)
    assert not any("input_scale" in name for name in read_file(tmp_path / "out"))
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    result = verify(tmp_path / "out", source)
    assert result.problems == [] and len(result.dropped) == 10


def test_the_kv_cache_of_a_source_stays_in_both_files(tmp_path: Path) -> None:
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    settings = {**EXPORTS["nvfp4_weights"]["quantization_config"], "kv_cache_scheme": scheme}
    source = exported(tmp_path / "source", "nvfp4_weights", quantization_config=settings)
    plan = run(source, tmp_path / "out", linear("nvfp4"), "modelopt")
    assert json.loads(plan.config)["quantization_config"]["kv_cache_scheme"] == scheme
    extra = json.loads(plan.extra_files["hf_quant_config.json"])["quantization"]
    assert extra["kv_cache_quant_algo"] == "FP8"
