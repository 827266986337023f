from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from halfbyte.errors import CheckpointError, HalfbyteError, VerifyError
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
    spell_per_expert,
    without_checksums,
    write_checkpoint,
    write_file,
)

DIALECTS = ["halfbyte", "compressed-tensors"]
LAYER = "model.language_model.layers.0."
EXPERTS = f"{LAYER}mlp.experts."


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)


@pytest.fixture(scope="module")
def originals(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same checkpoint in NVFP4, in each dialect."""
    folder = tmp_path_factory.mktemp("originals")
    for dialect in DIALECTS:
        run(moe, folder / dialect, linear("nvfp4"), dialect)
        without_checksums(folder / dialect)
    return {dialect: folder / dialect for dialect in DIALECTS}


@pytest.fixture
def out(originals: dict[str, Path], tmp_path: Path, dialect: str) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(originals[dialect], tmp_path / "out"))


def change(out: Path, edit: Callable[[Tensors], object]) -> None:
    """Rewrite the weights of an output after an edit of its tensors."""
    tensors = read_file(out)
    edit(tensors)
    write_file(out / "model.safetensors", tensors)


def problems(out: Path, source: Path) -> list[str]:
    result = verify(out, source)
    assert result.ok == (not result.problems)
    assert all("\n" not in problem for problem in result.problems)
    return result.problems


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_untouched_output_has_no_problem_and_counts_add_up(moe: Path, out: Path) -> None:
    seen: list[int] = []
    result = verify(out, moe, progress=seen.append)
    assert result.ok and result.quantized + result.kept == len(moe_tensors()) and result.dropped == {}
    assert sum(seen) == sum(a.nbytes for a in moe_tensors().values())
    assert 0.005 < result.relmse < 0.02 and len(result.errors) == result.quantized


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_source_in_the_other_spelling_of_experts_is_the_same_source(moe: Path, out: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", spell_per_expert(moe_tensors()), MOE_CONFIG)
    # MTP experts are kept as they are spelled, so only they differ
    assert all("mtp." in problem for problem in problems(out, other))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.visual.pos_embed.weight", f"{LAYER}mlp.gate.weight"])
def test_a_flipped_bit_in_a_kept_tensor(moe: Path, out: Path, name: str) -> None:
    def flip(tensors: Tensors) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].view(np.uint8).reshape(-1)[100] ^= 1

    change(out, flip)
    assert problems(out, moe) == [f"{name} was to be kept, but its bytes differ from the source"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_two_experts_that_changed_places(moe: Path, out: Path, dialect: str) -> None:
    def swap(tensors: Tensors) -> None:
        for name, array in list(tensors.items()):
            if dialect == "halfbyte" and name.startswith(f"{EXPERTS}down_proj_"):
                tensors[name] = array[[1, 0, 2, 3]]
            if f"{EXPERTS}0.down_proj." in name:
                other = name.replace("experts.0.", "experts.1.")
                tensors[name], tensors[other] = tensors[other], array

    change(out, swap)
    found = problems(out, moe)
    assert [problem.split(" has ")[0] for problem in found] == [f"expert {e} of {EXPERTS}down_proj" for e in (0, 1)]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("where", ["mlp.experts.down_proj", "mlp.experts.2.up_proj", "linear_attn.out_proj"])
def test_a_zeroed_weight_or_expert(moe: Path, out: Path, where: str, dialect: str) -> None:
    def zero(tensors: Tensors) -> None:
        for name, array in tensors.items():
            if name.startswith(LAYER + where) and name.endswith(("codes", "packed")):
                tensors[name] = np.zeros_like(array)
            if dialect == "halfbyte" and ".2." in where and name == f"{EXPERTS}gate_up_proj_codes":
                tensors[name] = array.copy()
                tensors[name][2, 128:] = 0

    if dialect == "compressed-tensors":
        where = where.replace("mlp.experts.down_proj", "mlp.experts.1.down_proj")
    change(out, zero)
    assert any("has a relative error of" in problem for problem in problems(out, moe))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["mtp.norm.weight", "model.visual.merger.linear_fc1.weight"])
def test_a_missing_kept_tensor(moe: Path, out: Path, name: str) -> None:
    change(out, lambda tensors: tensors.pop(name))
    assert problems(out, moe) == [f"{name} of the source is missing, and no rule of the recipe drops it"]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("ending", ["codes", "scales", "global_scale", "packed", "weight_scale", "global_scale"])
def test_a_missing_part_of_a_quantized_tensor(moe: Path, out: Path, ending: str) -> None:
    names = [name for name in read_file(out) if name.endswith(ending) and "out_proj" in name]
    if not names:  # the other dialect's word
        return
    change(out, lambda tensors: tensors.pop(names[0]))
    with pytest.raises(CheckpointError) as raised:
        raise CheckpointError("; ".join(problems(out, moe)))
    assert "out_proj" in str(raised.value)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["extra.weight", f"{LAYER}linear_attn.out_proj.weight_zero_point"])
def test_an_extra_tensor(moe: Path, out: Path, name: str) -> None:
    change(out, lambda tensors: tensors.update({name: np.zeros((2, 2), np.float32)}))
    assert problems(out, moe) == [f"{name} is not in the source; it does not belong here"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_changed_and_a_missing_side_file(moe: Path, out: Path) -> None:
    (out / "tokenizer.json").write_bytes(b'{"a": 2}')
    (out / "chat_template.jinja").unlink()
    assert problems(out, moe) == [
        "the side file chat_template.jinja of the source is missing",
        "the side file tokenizer.json differs from the source",
    ]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_config_without_its_quantization_config(moe: Path, out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    assert problems(out, moe) == ["config.json has no quantization_config, so engines would misread the packed tensors"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_config_that_is_missing_or_changed(moe: Path, out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert problems(out, moe) == ["config.json differs from the source in tie_word_embeddings"]
    (out / "config.json").unlink()
    assert "config.json is missing" in problems(out, moe)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_scale_that_is_nan(moe: Path, out: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        name = next(n for n in tensors if "out_proj" in n and n.endswith(("_scales", "weight_scale")))
        tensors[name] = tensors[name].copy()
        tensors[name].view(np.uint8)[3, 3] = 0x7F

    change(out, spoil)
    assert problems(out, moe) == [f"{LAYER}linear_attn.out_proj.weight decodes to a NaN or an infinity"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_zero_scale_on_a_block_that_is_not_zero(moe: Path, out: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        name = next(n for n in tensors if "out_proj" in n and n.endswith(("_scales", "weight_scale")))
        tensors[name] = tensors[name].copy()
        tensors[name].view(np.uint8)[3, 3] = 0

    change(out, spoil)
    assert problems(out, moe) == [
        f"{LAYER}linear_attn.out_proj.weight has a zero scale on a block that is not zero in the source"
    ]


def test_a_zero_scale_under_a_selector_bit_is_a_zero_scale(moe: Path, tmp_path: Path) -> None:
    out, name = tmp_path / "out", f"{LAYER}linear_attn.out_proj.weight"
    run(moe, out, linear("mixfp4"))
    without_checksums(out)
    tensors = read_file(out)
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"].copy()
    tensors[f"{name}_scales"][3, 3] = 0x80
    write_file(out / "model.safetensors", tensors)
    assert problems(out, moe) == [f"{name} has a zero scale on a block that is not zero in the source"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_kept_tensor_that_is_not_finite_in_source_and_output(moe: Path, tmp_path: Path, value: float) -> None:
    tensors, name = moe_tensors(), "mtp.norm.weight"
    run(moe, tmp_path / "out", linear("nvfp4"))
    without_checksums(tmp_path / "out")
    tensors[name][77] = value
    source = write_checkpoint(tmp_path / "source", tensors, MOE_CONFIG)
    change(tmp_path / "out", lambda stored: stored.update({name: tensors[name]}))
    assert [p for p in problems(tmp_path / "out", source) if p.startswith(name)]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_different_tensor_scales_in_a_fusion_group(moe: Path, out: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        name = next(n for n in tensors if "in_proj_z" in n and n.endswith(("_tensor_scale", "global_scale")))
        tensors[name] = tensors[name] * np.float32(1.01)

    change(out, spoil)
    wanted = "in_proj_z.weight and .*in_proj_qkv.weight are fused by engines but have different global scales"
    found = problems(out, moe)
    assert len(found) == 1
    with pytest.raises(VerifyError, match=wanted):
        raise VerifyError(found[0])


@pytest.mark.parametrize("dialect", ["compressed-tensors"])
def test_different_tensor_scales_of_gate_and_up_of_one_expert(moe: Path, out: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{EXPERTS}3.up_proj.weight_global_scale"] *= np.float32(1.01)

    change(out, spoil)
    assert problems(out, moe) == [
        f"{EXPERTS}3.up_proj.weight_global_scale differs from the scale of the projection it is fused with"
    ]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_unfinished_conversion(moe: Path, out: Path) -> None:
    (out / ".halfbyte").mkdir()
    (out / ".halfbyte" / "journal.jsonl").write_text("")
    with pytest.raises(VerifyError, match="is an unfinished conversion"):
        verify(out, moe)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_missing_file_of_several(moe: Path, tmp_path: Path, dialect: str) -> None:
    plan = run(moe, tmp_path / "out", linear("nvfp4"), dialect, max_shard_bytes=200_000)
    without_checksums(tmp_path / "out")
    (tmp_path / "out" / plan.shards[1].name).unlink()
    with pytest.raises(CheckpointError, match=f"shard {plan.shards[1].name} is named by the index but is missing"):
        verify(tmp_path / "out", moe)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stray_weight_file_beside_the_index_and_a_wrong_total(moe: Path, tmp_path: Path, dialect: str) -> None:
    plan = run(moe, tmp_path / "out", linear("nvfp4"), dialect, max_shard_bytes=200_000)
    without_checksums(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(str(plan.data_bytes), "12345"))
    assert problems(tmp_path / "out", moe) == [
        "model.safetensors is a weight file that the index does not name; an engine may load it instead",
        f"the index states 12345 bytes of tensors, but there are {plan.data_bytes}",
    ]


# Against the recipe


def test_experts_that_were_left_in_bf16(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", recipe({"match": "attention", "format": "nvfp4", "scale_search": "absmax"}))
    without_checksums(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "halfbyte.json").read_text())
    told["recipe"]["rules"][0]["match"] = ["attention", "experts"]
    (tmp_path / "out" / "halfbyte.json").write_text(json.dumps(told))
    found = problems(tmp_path / "out", moe)
    assert len(found) == 4 and all("is unquantized, but the recipe wants it nvfp4" in problem for problem in found)


def test_a_format_that_the_recipe_does_not_name(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"))
    told = (tmp_path / "out" / "halfbyte.json").read_text()
    (tmp_path / "out" / "halfbyte.json").write_text(told.replace('"nvfp4"', '"mixfp4"'))
    assert any("is nvfp4, but the recipe wants it mixfp4" in problem for problem in problems(tmp_path / "out", moe))


def test_what_the_recipe_drops_is_told_with_its_reason(moe: Path, tmp_path: Path) -> None:
    drop = {"match": ["mtp", "vision"], "drop": True, "reason": "text only"}
    run(moe, tmp_path / "out", recipe({"match": "experts", "format": "nvfp4", "scale_search": "absmax"}, drop))
    result = verify(tmp_path / "out", moe)
    assert result.ok and result.dropped["mtp.fc.weight"] == "text only"
    assert len(result.dropped) == sum(n.startswith(("mtp.", "model.visual.")) for n in moe_tensors())


def test_an_output_with_dropped_tensors_is_not_complete_without_its_recipe(moe: Path, tmp_path: Path) -> None:
    drop = {"match": "mtp", "drop": True, "reason": "not wanted"}
    run(moe, tmp_path / "out", recipe({"match": "experts", "format": "nvfp4", "scale_search": "absmax"}, drop))
    (tmp_path / "out" / "halfbyte.json").unlink()
    assert "mtp.fc.weight of the source is missing, and no rule of the recipe drops it" in problems(
        tmp_path / "out", moe
    )


def test_indivisible_weights_that_the_recipe_keeps_are_right(moe: Path, tmp_path: Path) -> None:
    run(
        moe,
        tmp_path / "out",
        recipe({"match": ["linear", "vision.linear"], "format": "mxfp4", "if_not_divisible": "keep"}),
    )
    assert problems(tmp_path / "out", moe) == []


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_wrong_source_is_recognised(out: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", moe_tensors(seed=1), MOE_CONFIG)
    assert sum("relative error" in problem for problem in problems(out, other)) > 10


def test_a_source_that_the_output_was_not_made_from_is_named(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"))
    assert verify(tmp_path / "out", moe).wrong_source == ""
    renamed = write_checkpoint(tmp_path / "renamed", moe_tensors(seed=1), MOE_CONFIG)
    said = f"{renamed} is not what {tmp_path / 'out'} was made from, which was moe"
    assert verify(tmp_path / "out", renamed).wrong_source == said
    namesake = write_checkpoint(tmp_path / "moe", moe_tensors(seed=1), MOE_CONFIG)
    assert verify(tmp_path / "out", namesake).wrong_source.endswith("was made from, which was another source")


def test_a_damaged_output_of_the_right_source_is_not_blamed_on_the_source(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"))
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    result = verify(tmp_path / "out", moe)
    assert not result.ok and result.wrong_source == ""


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_damaged_provenance_file_is_an_error(moe: Path, out: Path) -> None:
    (out / "halfbyte.json").write_text("{")
    with pytest.raises(HalfbyteError, match=r"halfbyte\.json cannot be used \(halfbyte\.json is not valid JSON"):
        verify(out, moe)


@pytest.mark.parametrize("ending", ["weight_shape", "weight_zero_point"])
def test_a_wrong_shape_entry_or_zero_point_of_int4(moe: Path, tmp_path: Path, ending: str) -> None:
    run(moe, tmp_path / "out", linear("int4_asym_g32"), "compressed-tensors")
    without_checksums(tmp_path / "out")

    def spoil(tensors: Tensors) -> None:
        name = f"{LAYER}linear_attn.out_proj.{ending}"
        tensors[name] = tensors[name] * 0 + (7 if ending == "weight_shape" else 0)

    change(tmp_path / "out", spoil)
    found = problems(tmp_path / "out", moe)
    assert len(found) == 1 and "out_proj" in found[0]


def test_slices_of_a_matrix_are_whole_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", dense_tensors(inter=512), DENSE_CONFIG)
    run(source, tmp_path / "out", linear("fp8_block128"))
    whole = verify(tmp_path / "out", source)
    # 128 rows of 128 columns, where a matrix has 512
    monkeypatch.setattr(import_module("halfbyte.verify.checkpoint_pair"), "SLICE_BYTES", 2 * 128 * 128)
    sliced = verify(tmp_path / "out", source)
    assert whole.ok and sliced.ok
    assert [e.relmse for e in sliced.errors] == pytest.approx([e.relmse for e in whole.errors])
    assert [e.elements for e in sliced.errors] == [e.elements for e in whole.errors]
