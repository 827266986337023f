from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.checkpoint import Inventory, Reader
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from small_models import (
    DENSE_CONFIG,
    MOE_CONFIG,
    Tensors,
    dense_tensors,
    heavy_tailed,
    linear,
    moe_tensors,
    read_file,
    recipe,
    run,
    write_checkpoint,
    write_file,
)

EXPERT = "model.language_model.layers.0.mlp.experts.2"
FUSED = "model.language_model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "moe", moe_tensors(), MOE_CONFIG)


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


SPELLING = {
    "nvfp4": {
        "weight_packed": ("U8", (128, 64)),
        "weight_scale": ("F8_E4M3", (128, 8)),
        "weight_global_scale": ("F32", (1,)),
    },
    "mxfp4": {"weight_packed": ("U8", (128, 64)), "weight_scale": ("U8", (128, 4))},
    "int4_g32": {
        "weight_packed": ("I32", (128, 16)),
        "weight_scale": ("BF16", (128, 4)),
        "weight_shape": ("I64", (2,)),
    },
    "int4_asym_g64": {
        "weight_packed": ("I32", (128, 16)),
        "weight_scale": ("BF16", (128, 2)),
        "weight_shape": ("I64", (2,)),
        "weight_zero_point": ("I32", (16, 2)),
    },
    "fp8_channel": {"weight": ("F8_E4M3", (128, 128)), "weight_scale": ("BF16", (128, 1))},
    "fp8_tensor": {"weight": ("F8_E4M3", (128, 128)), "weight_scale": ("F32", (1,))},
    "fp8_block128": {"weight": ("F8_E4M3", (128, 128)), "weight_scale": ("F32", (1, 1))},
    "mxfp8": {"weight": ("F8_E4M3", (128, 128)), "weight_scale": ("U8", (128, 4))},
}
SPELLING["mixfp4"] = SPELLING["nvfp4"]


@pytest.mark.parametrize("fmt", list(SPELLING))
def test_names_dtypes_and_shapes_of_a_module_are_those_of_the_library(moe: Path, tmp_path: Path, fmt: str) -> None:
    plan = run(moe, tmp_path / "out", linear(fmt), "compressed-tensors")
    written = Inventory.open(tmp_path / "out").tensors
    module = f"{EXPERT}.up_proj."
    found = {n.removeprefix(module): (t.dtype, t.shape) for n, t in written.items() if n.startswith(module)}
    assert found == SPELLING[fmt]
    assert len(written) == plan.tensors


def test_experts_are_written_one_by_one_and_none_is_left_in_bf16(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), "compressed-tensors")
    written = Inventory.open(tmp_path / "out").tensors
    packed = [n for n in written if ".language_model." in n and ".experts." in n and n.endswith("_packed")]
    assert len(packed) == 2 * 4 * 3
    assert not [n for n, t in written.items() if ".language_model." in n and ".experts." in n and t.dtype == "BF16"]


def test_gate_and_up_are_the_halves_of_the_fused_tensor(moe: Path, tmp_path: Path) -> None:
    fused = moe_tensors()[FUSED]
    run(moe, tmp_path / "out", linear("fp8_channel"), "compressed-tensors")
    stored = read_file(tmp_path / "out")
    for part, rows in (("gate", slice(0, 128)), ("up", slice(128, 256))):
        codes = stored[f"{EXPERT}.{part}_proj.weight"].astype(np.float32)
        values = codes * stored[f"{EXPERT}.{part}_proj.weight_scale"].astype(np.float32)
        assert np.abs(values - fused[2, rows].astype(np.float32)).max() < 0.02


def test_gate_and_up_of_an_expert_share_their_tensor_scale(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), "compressed-tensors")
    stored = read_file(tmp_path / "out")
    scales = [float(stored[f"{EXPERT}.{p}_proj.weight_global_scale"][0]) for p in ("gate", "up")]
    amax = np.abs(moe_tensors()[FUSED][2].astype(np.float32)).max()
    assert scales[0] == scales[1] == pytest.approx(2688 / amax, rel=1e-6)  # a divisor


@pytest.mark.parametrize("part", ["weight_global_scale", "weight_scale"])
@pytest.mark.parametrize(
    "group",
    [
        ["layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj"],
        ["layers.0.linear_attn.in_proj_qkv", "layers.0.linear_attn.in_proj_z"],
        ["layers.0.mlp.shared_expert.gate_proj", "layers.0.mlp.shared_expert.up_proj"],
    ],
)
def test_matrices_that_engines_fuse_share_their_tensor_scale(
    moe: Path, tmp_path: Path, group: list[str], part: str
) -> None:
    fmt = "nvfp4" if part == "weight_global_scale" else "fp8_tensor"
    run(moe, tmp_path / "out", linear(fmt), "compressed-tensors")
    stored = read_file(tmp_path / "out")
    assert len({float(stored[f"model.language_model.{name}.{part}"][0]) for name in group}) == 1


def test_mixfp4_is_decoded_by_an_independent_reading_of_its_encoding(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("mixfp4"), "compressed-tensors")
    stored = read_file(tmp_path / "out")
    fp4, int4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6], range(8)  # magnitudes; bit 3 of a nibble is the sign
    module, rows, used = f"{EXPERT}.down_proj.", [], set()
    scales_of_rows = stored[f"{module}weight_scale"].view(np.uint8)
    for packed, scales in zip(stored[f"{module}weight_packed"], scales_of_rows, strict=True):
        row = []
        for i, byte in enumerate(packed):
            scale_byte = int(scales[i // 8])
            used.add(scale_byte >> 7)
            scale = float(np.uint8(scale_byte & 127).view(ml_dtypes.float8_e4m3fn))
            for nibble in (byte & 15, byte >> 4):
                table = int4 if scale_byte >> 7 else fp4
                row.append((-1 if nibble & 8 else 1) * table[nibble & 7] * scale)
        rows.append(row)
    values = np.array(rows) / float(stored[f"{module}weight_global_scale"][0])
    ours = Checkpoint.open(tmp_path / "out")
    weight = next(w for w in ours.weights if w.name.endswith("layers.0.mlp.experts.down_proj"))
    with Reader(ours.inventory) as reader:
        assert np.allclose(ours.read(reader, weight)[2], values, rtol=1e-6, atol=0)
    assert used == {0, 1}  # both kinds of blocks occur


def test_tensors_that_engines_do_not_look_for_keep_their_names_and_bytes(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), "compressed-tensors")
    stored = read_file(tmp_path / "out")
    for name, array in moe_tensors().items():
        if name.startswith(("mtp.", "model.visual.")) or "norm" in name or "conv1d" in name or "mlp.gate." in name:
            assert stored[name].tobytes() == array.tobytes(), name


def test_mtp_and_vision_are_ignored_as_a_whole_and_the_main_model_by_kind(moe: Path) -> None:
    plan = make_plan(Checkpoint.open(moe), linear("nvfp4"), "compressed-tensors")
    config = json.loads(plan.config)["quantization_config"]
    assert set(config["ignore"]) == {
        r"re:^(model\.)?mtp.*",
        "re:.*visual.*",
        "re:.*lm_head$",
        "re:.*embed_tokens$",
        r"re:.*layers\.\d+\.mlp\.gate$",
        r"re:.*layers\.\d+\.mlp\.shared_expert_gate$",
        r"re:.*layers\.\d+\.linear_attn\.in_proj_a$",
        r"re:.*layers\.\d+\.linear_attn\.in_proj_b$",
    }
    assert r"re:.*layers\.\d+\.mlp\.experts\.\d+\.gate_proj$" in config["config_groups"]["group_0"]["targets"]


def test_quantized_mtp_modules_are_not_ignored(moe: Path) -> None:
    chosen = recipe({"match": ["linear", "mtp.attention"], "format": "nvfp4"})
    plan = make_plan(Checkpoint.open(moe), chosen, "compressed-tensors")
    config = json.loads(plan.config)["quantization_config"]
    assert not [p for p in config["ignore"] if p.startswith("re:^")]
    assert r"re:.*mtp\.fc$" in config["ignore"]


def test_routed_experts_come_first_since_transformers_takes_the_first_group_that_names_experts(tmp_path: Path) -> None:
    tensors = {n.replace("shared_expert.", "shared_experts."): a for n, a in moe_tensors().items()}
    config = {**MOE_CONFIG, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "text_config": {}}
    source = write_checkpoint(tmp_path / "source", tensors, {**config, "num_experts": 4})
    chosen = recipe(
        {"match": "shared_expert", "format": "fp8_channel"},
        {"match": "experts", "format": "nvfp4", "scale_search": "absmax"},
    )
    plan = make_plan(Checkpoint.open(source), chosen, "compressed-tensors")
    groups = json.loads(plan.config)["quantization_config"]["config_groups"].values()
    first = next(g for g in groups if any(t.startswith("re:") and "experts" in t for t in g["targets"]))
    assert first["format"] == "nvfp4-pack-quantized"


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([{"match": "experts", "format": "mxfp4"}], []),
        ([{"match": "experts", "format": "nvfp4"}], ["ignores the global scales of experts"]),
        ([{"match": "experts.down", "format": "mxfp4"}], ["some differ or are kept"]),
        (
            [{"match": "experts", "format": "mxfp4"}, {"match": "experts.down", "format": "mxfp8"}],
            ["some differ or are kept"],
        ),
        ([{"match": "attention", "format": "mixfp4"}], ["does not know mixfp4-pack-quantized"]),
    ],
)
def test_a_plan_says_what_engines_do_not_load(moe: Path, rules: list[dict[str, str]], said: list[str]) -> None:
    notes = make_plan(Checkpoint.open(moe), recipe(*rules), "compressed-tensors").notes
    assert len(notes) == len(said) and all(text in note for text, note in zip(said, notes, strict=True))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": r"re:conv1d", "format": "fp8_channel"}, "stores matrices, and .*conv1d.* has the shape"),
        ({"match": r"re:patch_embed", "format": "nvfp4"}, "stores matrices, and .*patch_embed"),
        ({"match": "embedding", "format": "nvfp4"}, "embedding, which no engine reads quantized"),
        ({"match": "experts", "format": "razer"}, "no spelling for razer; use the dialect halfbyte"),
    ],
)
def test_what_engines_cannot_read_is_refused(moe: Path, rule: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(Checkpoint.open(moe), recipe({"scale_search": "absmax", **rule}), "compressed-tensors")


def test_interleaved_experts_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: Tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": heavy_tailed(rng, 2, 64, 128),
        "model.layers.0.mlp.experts.down_proj": heavy_tailed(rng, 2, 64, 64),
    }
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 64, "num_experts": 2}
    source = write_checkpoint(tmp_path / "source", tensors, config)
    with pytest.raises(PlanError, match=r"interleaves its projections.*use the dialect halfbyte"):
        make_plan(Checkpoint.open(source), linear("nvfp4"), "compressed-tensors")


def test_block_scales_that_straddle_gate_and_up_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": heavy_tailed(rng, 2, 192, 128)}
    source = write_checkpoint(tmp_path / "source", tensors, {"model_type": "qwen3_moe", "hidden_size": 128})
    with pytest.raises(PlanError, match="do not begin at blocks of 128 rows"):
        make_plan(Checkpoint.open(source), linear("fp8_block128"), "compressed-tensors")


def test_rows_that_do_not_fill_a_word_of_zero_points_are_padded(tmp_path: Path) -> None:
    tensors = dense_tensors(inter=256)
    tensors["model.layers.0.self_attn.o_proj.weight"] = heavy_tailed(np.random.default_rng(1), 12, 128)
    source = write_checkpoint(tmp_path / "source", tensors, DENSE_CONFIG)
    run(source, tmp_path / "out", linear("int4_asym_g32"), "compressed-tensors")
    run(source, tmp_path / "own", linear("int4_asym_g32"), "halfbyte")
    assert read_file(tmp_path / "out")["model.layers.0.self_attn.o_proj.weight_zero_point"].shape == (2, 4)
    values = [read_all(tmp_path / name) for name in ("out", "own")]
    assert all(np.array_equal(values[0][name], values[1][name]) for name in values[1])


def read_all(folder: Path) -> Tensors:
    checkpoint = Checkpoint.open(folder)
    with Reader(checkpoint.inventory) as reader:
        return {w.name: checkpoint.read(reader, w) for w in checkpoint.weights}


def damaged(folder: Path, out: Path, change: dict[str, Any], drop: str = "") -> Path:
    """A copy of a converted checkpoint with some tensors replaced or one left out."""
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    tensors = {name: array for name, array in read_file(folder).items() if name != drop}
    write_file(out / "model.safetensors", {**tensors, **change})
    return out


def test_gate_and_up_with_different_scales_are_decoded_each_by_its_own(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), "compressed-tensors")
    name = f"{EXPERT}.up_proj.weight_global_scale"
    half = read_file(tmp_path / "out")[name] / 2
    other = damaged(tmp_path / "out", tmp_path / "other", {name: half})
    stack = f"{EXPERT.removesuffix('.2')}.gate_up_proj"
    before, after = (read_all(folder)[stack] for folder in (tmp_path / "out", other))
    assert np.array_equal(after[2, 128:], 2 * before[2, 128:])
    before[2, 128:] = after[2, 128:]
    assert np.array_equal(after, before)
    checkpoint = Checkpoint.open(other)
    weight = next(w for w in checkpoint.weights if w.name == stack)
    with Reader(checkpoint.inventory) as reader, pytest.raises(CheckpointError, match=r"2\.up_proj\.\w+ differs"):
        checkpoint.read_quantized(reader, weight)


def test_a_module_without_its_scale_is_an_error(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), "compressed-tensors")
    bad = damaged(tmp_path / "out", tmp_path / "bad", {}, drop=f"{EXPERT}.up_proj.weight_scale")
    with pytest.raises(CheckpointError, match=r"lacks the tensor .*2\.up_proj\.weight_scale"):
        read_all(bad)


def test_a_scale_of_the_wrong_shape_is_an_error(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("mxfp4"), "compressed-tensors")
    bad = damaged(tmp_path / "out", tmp_path / "bad", {f"{EXPERT}.up_proj.weight_scale": np.zeros((64, 4), np.uint8)})
    with pytest.raises(CheckpointError, match=r"shape \[64, 4\], but its weight needs \[128, 4\]"):
        read_all(bad)


def with_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def group(fmt: str, targets: list[str]) -> dict[str, Any]:
    from halfbyte.dialects.compressed_tensors_config import SCHEMES

    spelled, weights, _ = SCHEMES[fmt]
    return {"targets": targets, "weights": weights, "format": spelled}


def test_a_target_by_class_covers_what_no_name_does(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG)
    chosen = recipe({"match": "linear", "format": "int4_g32"}, {"match": "lm_head", "format": "int4_g64"})
    run(source, tmp_path / "out", chosen, "compressed-tensors")
    before = read_all(tmp_path / "out")
    with_config(
        tmp_path / "out", config_groups={"a": group("int4_g64", ["lm_head"]), "b": group("int4_g32", ["Linear"])}
    )
    after = read_all(tmp_path / "out")
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)


def test_a_module_without_a_scheme_is_an_error(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), "compressed-tensors")
    with_config(tmp_path / "out", config_groups={"a": group("nvfp4", ["re:.*experts.*"])})
    with pytest.raises(CheckpointError, match=r"no config group of .* has .* as a target"):
        Checkpoint.open(tmp_path / "out")


def test_an_unknown_scheme_is_an_error(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), "compressed-tensors")
    strange = {"targets": ["Linear"], "weights": {"num_bits": 3, "type": "int"}, "format": "pack-quantized"}
    with_config(tmp_path / "out", config_groups={"a": strange})
    with pytest.raises(CheckpointError, match=r"scheme .*'num_bits': 3.* is not supported"):
        Checkpoint.open(tmp_path / "out")
