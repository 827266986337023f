"""Names, settings, refusals and the way back of the MLX dialect; test_mlx_engine.py has MLX itself as the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.dialects import get_dialect
from halfbyte.errors import CheckpointError, FormatError, PlanError
from halfbyte.formats import get_format
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import (
    DENSE_CONFIG,
    MOE_CONFIG,
    Tensors,
    dense_tensors,
    linear,
    moe_tensors,
    read_file,
    recipe,
    run,
    write_checkpoint,
)

TEXT = "model.language_model.layers."
MIXED = recipe(
    {"match": "linear", "format": "affine8", "scale_search": "absmax"},
    {"match": "experts", "format": "mxfp4", "scale_search": "absmax"},
    {"match": "embedding", "format": "affine6", "scale_search": "absmax"},
)


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def moe(folder: Path, per_expert: bool = False, **changes: Any) -> Path:
    return write_checkpoint(folder, moe_tensors(per_expert), {**MOE_CONFIG, **changes})


def plan_of(source: Path, what: Any, dialect: str = "mlx") -> Plan:
    return make_plan(Checkpoint.open(source), what, dialect)


@pytest.mark.parametrize("per_expert", [False, True])
def test_experts_are_one_stack_per_projection(tmp_path: Path, per_expert: bool) -> None:
    source, out = moe(tmp_path / "source", per_expert), tmp_path / "out"
    run(source, out, MIXED, "mlx")
    tensors = read_file(out)
    prefix = f"{TEXT}0.mlp.switch_mlp"
    for part, n, k in (("gate", 128, 128), ("up", 128, 128), ("down", 128, 128)):
        assert tensors[f"{prefix}.{part}_proj.weight"].shape == (4, n, k // 8)
        assert tensors[f"{prefix}.{part}_proj.weight"].dtype == np.uint32
        assert tensors[f"{prefix}.{part}_proj.scales"].shape == (4, n, k // 32)
    assert not any(".mlp.experts." in name for name in tensors if not name.startswith("mtp."))
    assert verify(out, source).ok


def test_settings_name_what_differs_by_the_module_path(tmp_path: Path) -> None:
    run(moe(tmp_path / "source"), tmp_path / "out", MIXED, "mlx")
    config = settings(tmp_path / "out")
    found = config["quantization"]
    assert config["quantization_config"] == found
    assert (found["group_size"], found["bits"], found["mode"]) == (64, 8, "affine")
    assert found["language_model.model.embed_tokens"] == {"group_size": 64, "bits": 6, "mode": "affine"}
    assert found["language_model.model.layers.1.mlp.switch_mlp.up_proj"]["mode"] == "mxfp4"
    assert not any("self_attn" in name for name in found)


def test_what_is_kept_has_its_bytes_and_name(tmp_path: Path) -> None:
    run(moe(tmp_path / "source"), tmp_path / "out", MIXED, "mlx")
    before, after = read_file(tmp_path / "source"), read_file(tmp_path / "out")
    for name in (f"{TEXT}0.linear_attn.conv1d.weight", f"{TEXT}1.input_layernorm.weight", f"{TEXT}0.mlp.gate.weight"):
        assert after[name].tobytes() == before[name].tobytes()
    visual = {name for name in before if name.startswith(("mtp.", "model.visual."))}
    assert visual and all(after[name].tobytes() == before[name].tobytes() for name in visual)


def test_the_plan_says_what_mlx_lm_ignores(tmp_path: Path) -> None:
    notes = plan_of(moe(tmp_path / "source"), MIXED).notes
    assert "mlx-lm ignores the vision tower and multi-token prediction; mlx-vlm reads what it ignores" in notes


def test_nvfp4_has_a_tensor_scale_for_experts_only_and_the_plan_says_so(tmp_path: Path) -> None:
    source, out = moe(tmp_path / "source"), tmp_path / "out"
    plan = run(source, out, linear("nvfp4"), "mlx")
    assert {i.format.name for i in plan.items if i.format and i.weight.role.startswith("experts")} == {"nvfp4"}
    assert {i.format.name for i in plan.items if i.format and i.weight.role.startswith("attention")} == {
        "nvfp4_unscaled"
    }
    said = " ".join(plan.notes)
    assert "no global scale for nvfp4" in said and "needs mlx 0.32 and a GPU" in said
    scale = read_file(out)[f"{TEXT}0.mlp.switch_mlp.gate_proj.global_scale"]
    assert scale.shape == (4,) and scale.dtype == np.float32
    assert np.array_equal(np.frexp(scale / np.float32(2688))[0], np.full(4, 0.5))
    entry = settings(out)["quantization"]["language_model.model.layers.0.mlp.switch_mlp.gate_proj"]
    assert entry == {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True}
    assert verify(out, source).ok


def test_every_stored_global_scale_is_written_again(tmp_path: Path) -> None:
    dialect, fmt = get_dialect("mlx"), get_format("nvfp4")
    output = _stack_output(tmp_path)
    stored = np.random.RandomState(0).uniform(1e-3, 1e3, 4096).astype(np.float32)
    read = dialect.spelling.unpack(output, stored, fmt, stored.shape)
    again = dialect.spelling.unpack(output, dialect.spelling.pack(output, read, fmt), fmt, stored.shape)
    assert np.array_equal(read, again)


def _stack_output(folder: Path) -> Any:
    plan = plan_of(moe(folder / "source"), linear("nvfp4"))
    return next(o for item in plan.items for o in item.outputs if o.part == "global_scale")


@pytest.mark.parametrize("per_expert", [False, True])
def test_kept_experts_become_stacks_and_are_verified(tmp_path: Path, per_expert: bool) -> None:
    source, out = moe(tmp_path / "source", per_expert), tmp_path / "out"
    run(source, out, recipe({"match": "experts.down", "format": "affine4", "scale_search": "absmax"}), "mlx")
    before, after = moe_tensors(), read_file(out)
    fused = before[f"{TEXT}0.mlp.experts.gate_up_proj"]
    assert np.array_equal(after[f"{TEXT}0.mlp.switch_mlp.gate_proj.weight"], fused[:, :128])
    assert np.array_equal(after[f"{TEXT}0.mlp.switch_mlp.up_proj.weight"], fused[:, 128:])
    result = verify(out, source)
    assert result.ok and result.quantized == 2
    damaged = {**after, f"{TEXT}0.mlp.switch_mlp.up_proj.weight": after[f"{TEXT}0.mlp.switch_mlp.gate_proj.weight"]}
    write_checkpoint(out, damaged, settings(out))
    assert any("values differ" in problem for problem in verify(out, source).problems)


@pytest.mark.parametrize("fmt", ["affine3", "affine5_g32", "mxfp4", "mxfp8", "nvfp4"])
def test_a_checkpoint_of_its_own_is_a_source_and_keeps_its_bytes(tmp_path: Path, fmt: str) -> None:
    source = moe(tmp_path / "source")
    run(source, tmp_path / "once", linear(fmt), "mlx")
    plan = run(tmp_path / "once", tmp_path / "twice", linear(fmt), "mlx")
    assert {i.action for i in plan.items} <= {"transcode", "keep"}
    once, twice = read_file(tmp_path / "once"), read_file(tmp_path / "twice")
    assert {n: a.tobytes() for n, a in once.items()} == {n: a.tobytes() for n, a in twice.items()}
    assert settings(tmp_path / "once") == settings(tmp_path / "twice")


def test_mxfp4_goes_to_another_dialect_with_the_same_codes(tmp_path: Path) -> None:
    source = moe(tmp_path / "source")
    run(source, tmp_path / "mlx", linear("mxfp4"), "mlx")
    run(tmp_path / "mlx", tmp_path / "other", linear("mxfp4"), "compressed-tensors")
    run(source, tmp_path / "direct", linear("mxfp4"), "compressed-tensors")
    there, direct = read_file(tmp_path / "other"), read_file(tmp_path / "direct")
    assert {n: a.tobytes() for n, a in there.items()} == {n: a.tobytes() for n, a in direct.items()}
    assert verify(tmp_path / "other", source).ok
    assert "quantization" not in settings(tmp_path / "other")


def test_nvfp4_of_other_dialects_is_requantized_since_mlx_stores_other_tensor_scales(tmp_path: Path) -> None:
    run(moe(tmp_path / "source"), tmp_path / "ct", linear("nvfp4"), "compressed-tensors")
    plan = plan_of(tmp_path / "ct", linear("nvfp4"))
    assert {i.action for i in plan.items if i.format} == {"quantize"}


def converted(tensors: Tensors) -> Tensors:
    """As mlx_lm.convert leaves Qwen3.5: other prefixes, transposed convolutions, norms with 1 added, no MTP."""
    found: Tensors = {}
    for name, array in tensors.items():
        if name.startswith(("mtp.", "model.visual.")):
            continue
        if name.endswith("conv1d.weight"):
            array = np.ascontiguousarray(np.swapaxes(array, 1, 2))
        elif name.endswith(("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")):
            array = (array.astype(np.float32) + 1).astype(ml_dtypes.bfloat16)
        name = name.replace("model.language_model.", "language_model.model.")
        found["language_model.lm_head.weight" if name == "lm_head.weight" else name] = array
    return found


def test_layouts_after_mlx_own_conversion_are_read_as_the_original_ones(tmp_path: Path) -> None:
    source = moe(tmp_path / "source")
    run(source, tmp_path / "ours", MIXED, "mlx")
    theirs = write_checkpoint(tmp_path / "theirs", converted(read_file(tmp_path / "ours")), settings(tmp_path / "ours"))
    run(theirs, tmp_path / "back", MIXED, "halfbyte")
    before, after = read_file(source), read_file(tmp_path / "back")
    conv, norm = f"{TEXT}0.linear_attn.conv1d.weight", f"{TEXT}1.input_layernorm.weight"
    assert after[conv].tobytes() == before[conv].tobytes()
    rounded = (before[norm].astype(np.float32) + 1).astype(ml_dtypes.bfloat16).astype(np.float32) - 1
    assert after[norm].dtype == np.float32 and np.array_equal(after[norm], rounded)
    plain = f"{TEXT}0.linear_attn.norm.weight"
    assert after[plain].tobytes() == before[plain].tobytes()
    run(source, tmp_path / "direct", MIXED, "halfbyte")
    direct = read_file(tmp_path / "direct")
    quantized = [name for name in direct if name.endswith(("_codes", "_scales"))]
    assert quantized and all(after[name].tobytes() == direct[name].tobytes() for name in quantized)


def test_text_models_get_the_type_that_mlx_lm_knows(tmp_path: Path) -> None:
    text = dict(MOE_CONFIG["text_config"])
    tensors = {n.replace("model.language_model.", "model."): a for n, a in moe_tensors().items() if "visual" not in n}
    source = write_checkpoint(tmp_path / "source", tensors, text)
    run(source, tmp_path / "out", MIXED, "mlx")
    config = settings(tmp_path / "out")
    assert config["model_type"] == "qwen3_5_moe"
    assert "language_model.model.embed_tokens" in config["quantization"]
    assert verify(tmp_path / "out", source).ok
    run(tmp_path / "out", tmp_path / "back", MIXED, "halfbyte")
    assert settings(tmp_path / "back")["model_type"] == "qwen3_5_moe_text"


def test_newer_settings_are_repeated_where_mlx_lm_reads_them(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    config = {**DENSE_CONFIG, "rope_parameters": rope, "num_local_experts": 4}
    source = write_checkpoint(tmp_path / "source", dense_tensors(), config)
    run(source, tmp_path / "out", linear("mxfp4"), "mlx")
    found = settings(tmp_path / "out")
    assert (found["rope_theta"], found["rope_scaling"], found["num_experts"]) == (5e5, rope, 4)
    assert verify(tmp_path / "out", source).ok
    run(tmp_path / "out", tmp_path / "back", linear("mxfp4"), "halfbyte")
    back = settings(tmp_path / "back")
    assert {key: back[key] for key in config} == config and "rope_theta" not in back


def test_layer_types_that_mlx_lm_would_not_follow_are_refused(tmp_path: Path) -> None:
    text = {**MOE_CONFIG["text_config"], "layer_types": ["full_attention", "linear_attention"]}
    with pytest.raises(PlanError, match="full_attention_interval"):
        plan_of(moe(tmp_path / "source", text_config=text), MIXED)


def test_the_copy_of_a_tied_embedding_is_left_out(tmp_path: Path) -> None:
    config = {**DENSE_CONFIG, "tie_word_embeddings": True}
    source = write_checkpoint(tmp_path / "source", dense_tensors(tied=True), config)
    run(source, tmp_path / "out", linear("affine4"), "mlx")
    assert "lm_head.weight" not in read_file(tmp_path / "out")
    result = verify(tmp_path / "out", source)
    assert result.ok and "tied" in result.dropped["lm_head.weight"]


def test_a_tied_lm_head_is_not_quantized(tmp_path: Path) -> None:
    config = {**DENSE_CONFIG, "tie_word_embeddings": True}
    source = write_checkpoint(tmp_path / "source", dense_tensors(tied=True), config)
    both = recipe({"match": ["embedding", "lm_head"], "format": "affine4", "scale_search": "absmax"})
    with pytest.raises(PlanError, match="drop it by a rule"):
        plan_of(source, both)


@pytest.mark.parametrize(
    ("fmt", "match", "said"),
    [
        ("mixfp4", "linear", "MLX has no mode for mixfp4"),
        ("int4_asym", "linear", "MLX has no mode for int4_asym"),
        ("mxfp4", "mtp.fc", "keep it"),
        ("mxfp4", "linear_attention.conv", "has the shape"),
    ],
)
def test_what_mlx_cannot_hold_is_refused(tmp_path: Path, fmt: str, match: str, said: str) -> None:
    with pytest.raises((PlanError, FormatError), match=said):
        tensors = moe_tensors() | {f"{TEXT}0.linear_attn.conv1d.weight": np.ones((8, 1, 128), np.float32)}
        source = write_checkpoint(tmp_path / "source", tensors, MOE_CONFIG)
        plan_of(source, recipe({"match": match, "format": fmt, "scale_search": "absmax"}))


def test_nvfp4_needs_multiples_of_32(tmp_path: Path) -> None:
    source = moe(tmp_path / "source")
    rule = {"match": "vision.linear", "format": "nvfp4", "scale_search": "absmax"}
    with pytest.raises(FormatError, match="multiple of 32"):
        plan_of(source, recipe(rule))
    plan = plan_of(source, recipe({**rule, "if_not_divisible": "keep"}))
    kept = {i.weight.name for i in plan.items if i.action == "keep"}
    assert "model.visual.blocks.0.mlp.linear_fc2.weight" in kept


def damaged(folder: Path, change: Any, fmt: str = "affine4") -> Path:
    """A checkpoint of the dialect after a change of its tensors and settings."""
    run(moe(folder / "source"), folder / "good", linear(fmt), "mlx")
    tensors, config = read_file(folder / "good"), settings(folder / "good")
    change(tensors, config)
    return write_checkpoint(folder / "bad", tensors, config)


def test_wrong_parameters_are_refused(tmp_path: Path) -> None:
    bad = damaged(tmp_path, lambda _, config: config["quantization_config"].update(bits=8))
    # the first of both is what MLX reads
    Checkpoint.open(bad)
    worse = settings(bad)
    worse["quantization"]["bits"] = 8
    (bad / "config.json").write_text(json.dumps(worse))
    with pytest.raises(CheckpointError, match="does not fit 8 bits in groups of 64"):
        Checkpoint.open(bad)


def test_a_missing_projection_is_refused(tmp_path: Path) -> None:
    bad = damaged(tmp_path, lambda tensors, _: tensors.pop(f"{TEXT}0.mlp.switch_mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"switch_mlp\.gate_proj\.weight"):
        Checkpoint.open(bad)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    bad = damaged(tmp_path, lambda tensors, _: tensors.pop(f"{TEXT}1.self_attn.q_proj.biases"))
    with pytest.raises(CheckpointError, match=r"q_proj\.biases"):
        plan_of(bad, linear("affine4"))


def test_projections_in_different_formats_are_refused(tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Any) -> None:
        name = f"{TEXT}0.mlp.switch_mlp.up_proj.scales"
        tensors[name] = np.repeat(tensors[name], 2, axis=-1)

    with pytest.raises(CheckpointError, match="mxfp4 and nvfp4_unscaled"):
        Checkpoint.open(damaged(tmp_path, change, "mxfp4"))


def test_projections_with_a_global_scale_each_are_read(tmp_path: Path) -> None:
    name = f"{TEXT}0.mlp.switch_mlp.up_proj.global_scale"

    def change(tensors: Tensors, _: Any) -> None:
        tensors[name] = tensors[name] * np.float32(2)

    from halfbyte.checkpoint import Reader

    bad = Checkpoint.open(damaged(tmp_path, change, "nvfp4"))
    good = Checkpoint.open(tmp_path / "good")
    weight = next(w for w in bad.weights if w.name == f"{TEXT}0.mlp.experts.gate_up_proj")
    with Reader(bad.inventory) as left, Reader(good.inventory) as right:
        ours, theirs = bad.read(left, weight), good.read(right, weight)
    assert np.array_equal(ours[:, :128], theirs[:, :128])
    assert np.array_equal(ours[:, 128:], 2 * theirs[:, 128:])


def test_keys_of_the_configuration_that_are_null_stay(tmp_path: Path) -> None:
    run(moe(tmp_path / "moe", pad_token_id=None), tmp_path / "out", MIXED, "mlx")
    assert settings(tmp_path / "out")["pad_token_id"] is None
