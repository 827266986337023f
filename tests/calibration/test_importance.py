"""Importance under the checkpoint's own names, and the way from entries to weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.calibration import Importance, match_importance, read_importance, write_importance
from halfbyte.calibration.importance import spelled_for_llama
from halfbyte.calibration.statistics import Part, new_description, write_description, write_part
from halfbyte.checkpoint import build_header
from halfbyte.errors import CheckpointError
from halfbyte.models import Weight, family_for
from models.helpers import experts, inventory

L = "model.layers.0."
DENSE = {
    L + "self_attn.q_proj.weight": (8, 8),
    L + "mlp.gate_proj.weight": (4, 8),
    L + "mlp.up_proj.weight": (4, 8),
    L + "mlp.down_proj.weight": (8, 4),
    L + "input_layernorm.weight": (8,),
}


def weights(shapes: dict[str, tuple[int, ...]], model_type: str, **config: Any) -> list[Weight]:
    told = {"model_type": model_type, "hidden_size": 8, **config}
    return family_for(told).weights(inventory(shapes, told))


def entries(pairs: dict[str, Any], counts: dict[str, Any] | None = None) -> Importance:
    values = {f"blk.{n}.weight": np.asarray(v, np.float32) for n, v in pairs.items()}
    given = {f"blk.{n}.weight": np.asarray(c, np.int64) for n, c in (counts or {}).items()}
    return Importance(values, {n: given.get(n, np.full(v.shape[:-1], 3)) for n, v in values.items()}, "gguf")


def test_halfbytes_own_file_keeps_everything(tmp_path: Path) -> None:
    values = {"a.weight": np.float32([1, 2, 3]), "experts": np.float32([[1, 2], [3, 4]])}
    counts = {"a.weight": np.asarray(512), "experts": np.asarray([7, 0])}
    write_importance(Importance(values, counts, "checkpoint", ("wiki", "chat"), 9), tmp_path / "i.safetensors")
    found = read_importance(tmp_path / "i.safetensors")
    assert (found.spelling, found.datasets, found.chunks) == ("checkpoint", ("wiki", "chat"), 9)
    for name in values:
        np.testing.assert_array_equal(found.values[name], values[name])
        np.testing.assert_array_equal(found.counts[name], counts[name])


def test_the_content_decides_and_not_the_ending(tmp_path: Path) -> None:
    write_importance(Importance({"a": np.float32([1])}, {"a": np.asarray(1)}), tmp_path / "i.dat")
    assert list(read_importance(tmp_path / "i.dat").values) == ["a"]


def test_a_folder_of_statistics_is_read_as_means(tmp_path: Path) -> None:
    part = Part({"a.weight": {"count": np.asarray(4), "squares": np.float64([4, 8])}}, {"b.weight": "a.weight"})
    write_part(tmp_path, "layer-00000", part)
    write_description(tmp_path, new_description(complete=True, parts=["layer-00000"], texts=["wiki"]))
    found = read_importance(tmp_path)
    assert list(found.values) == ["a.weight", "b.weight"] and found.datasets == ("wiki",)
    np.testing.assert_array_equal(found.values["b.weight"], np.float32([1, 2]))


def test_llama_cpps_names_are_not_written_as_a_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="match it to a checkpoint first"):
        write_importance(entries({"0.attn_q": [1]}), tmp_path / "i.safetensors")


NOTE = {"format": "halfbyte-importance", "version": "1"}


@pytest.mark.parametrize(
    ("table", "metadata", "problem"),
    [
        ([("a", "F32", (2,))], {"format": "pt"}, "holds no importance"),
        ([("a", "F32", (2,))], {**NOTE, "version": "2"}, "newer version"),
        ([("a", "BF16", (2,)), ("a.counts", "I64", ())], NOTE, "is BF16"),
        ([("a", "F32", (2,))], NOTE, "a in i.safetensors and its counts"),
        ([("a", "F32", (2, 2)), ("a.counts", "I64", (3,))], NOTE, "do not fit each other"),
        ([("a.counts", "I64", ())], NOTE, "a tensor that is not there"),
    ],
)
def test_a_file_that_halfbyte_would_not_write_is_refused(
    tmp_path: Path, table: list[Any], metadata: dict[str, str], problem: str
) -> None:
    layout = build_header(table, metadata)
    (tmp_path / "i.safetensors").write_bytes(layout.header + bytes(layout.total - len(layout.header)))
    with pytest.raises(CheckpointError, match=problem):
        read_importance(tmp_path / "i.safetensors")


def test_a_negative_value_is_refused(tmp_path: Path) -> None:
    write_importance(Importance({"a": np.float32([-1])}, {"a": np.asarray(1)}), tmp_path / "i.safetensors")
    with pytest.raises(CheckpointError, match=r"a in i\.safetensors holds a value that is negative"):
        read_importance(tmp_path / "i.safetensors")


def test_llama_cpps_names_find_their_weights_by_role_and_layer() -> None:
    found = match_importance(entries({"0.attn_q": [1] * 8, "0.ffn_down": [2] * 4}), weights(DENSE, "llama"))
    assert set(found.values) == {L + "self_attn.q_proj.weight", L + "mlp.down_proj.weight"}
    assert found.uncovered == [L + "mlp.gate_proj.weight", L + "mlp.up_proj.weight"] and not found.unmatched


def test_entries_that_no_weight_answers_to_are_listed() -> None:
    found = match_importance(entries({"0.attn_q": [1] * 8, "5.attn_q": [1] * 8, "0.odd": [1]}), weights(DENSE, "llama"))
    assert found.unmatched == ["blk.5.attn_q.weight", "blk.0.odd.weight"]


def test_own_names_are_matched_as_they_are() -> None:
    name = L + "mlp.down_proj.weight"
    found = match_importance(Importance({name: np.float32([1] * 4)}, {name: np.asarray(1)}), weights(DENSE, "llama"))
    assert list(found.values) == [name]


def test_another_models_file_is_refused_with_both_sizes() -> None:
    problem = r"blk\.0\.attn_q\.weight has shape \[6\], but model\.layers\.0\.self_attn\.q_proj\.weight needs \[8\]"
    with pytest.raises(CheckpointError, match=problem):
        match_importance(entries({"0.attn_q": [1] * 6}), weights(DENSE, "llama"))


def moe() -> list[Weight]:
    return weights(experts(2), "qwen3_moe", num_experts=2)


GATE_UP, DOWN = L + "mlp.experts.gate_up_proj", L + "mlp.experts.down_proj"


def test_gate_and_up_of_experts_become_one_by_maximum() -> None:
    gate, up = np.ones((2, 8)), np.ones((2, 8)) * [[2], [0.5]]
    found = match_importance(entries({"0.ffn_gate_exps": gate, "0.ffn_up_exps": up}), moe())
    np.testing.assert_array_equal(found.values[GATE_UP][:, 0], [2, 1])
    assert found.uncovered == [DOWN]


def test_a_flat_stack_of_a_legacy_file_is_cut_into_experts() -> None:
    found = match_importance(entries({"0.ffn_down_exps": [1, 2, 3, 4, 5, 6, 7, 8]}, {"0.ffn_down_exps": 3}), moe())
    np.testing.assert_array_equal(found.values[DOWN], [[1, 2, 3, 4], [5, 6, 7, 8]])
    np.testing.assert_array_equal(found.counts[DOWN], [3, 3])


def test_an_expert_without_tokens_gets_a_constant_and_is_reported() -> None:
    pairs = {"0.ffn_down_exps": [[1, 2, 3, 6], [0, 0, 0, 0]]}
    found = match_importance(entries(pairs, {"0.ffn_down_exps": [4, 0]}), moe())
    np.testing.assert_array_equal(found.values[DOWN], [[1, 2, 3, 6], [3, 3, 3, 3]])
    assert found.no_data == {DOWN: [1]}


def test_experts_without_any_token_have_no_importance() -> None:
    found = match_importance(entries({"0.ffn_down_exps": np.zeros((2, 4))}, {"0.ffn_down_exps": [0, 0]}), moe())
    assert DOWN not in found.values and found.no_data == {DOWN: [0, 1]} and DOWN in found.uncovered


def test_deltanet_layers_use_the_names_of_attention() -> None:
    shapes = {
        L + "linear_attn.in_proj_qkv.weight": (8, 8),
        L + "linear_attn.in_proj_z.weight": (8, 8),
        L + "linear_attn.in_proj_a.weight": (2, 8),
        L + "linear_attn.in_proj_b.weight": (2, 8),
        L + "linear_attn.out_proj.weight": (8, 8),
        L + "mlp.gate.weight": (2, 8),
        L + "mlp.shared_expert_gate.weight": (1, 8),
    }
    names = ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out", "ffn_gate_inp", "ffn_gate_inp_shexp")
    found = match_importance(entries({f"0.{n}": [1] * 8 for n in names}), weights(shapes, "qwen3_5_moe_text"))
    assert set(found.values) == set(shapes) and not found.unmatched


def test_mtp_layers_count_on_from_the_main_models() -> None:
    shapes = {**DENSE, "mtp.layers.0.self_attn.q_proj.weight": (8, 8), "mtp.fc.weight": (8, 16)}
    pairs = {"1.attn_q": [1] * 8, "1.nextn.eh_proj": [1] * 16}
    found = match_importance(entries(pairs), weights(shapes, "qwen3_5_text"))
    assert set(found.values) == {"mtp.layers.0.self_attn.q_proj.weight", "mtp.fc.weight"}


def test_experts_stored_with_input_rows_are_measured_along_them() -> None:
    shapes = {L + "mlp.experts.gate_up_proj": (2, 8, 6)}
    found = match_importance(entries({"0.ffn_up_exps": np.ones((2, 8))}), weights(shapes, "gpt_oss"))
    assert found.values[GATE_UP].shape == (2, 8)


def test_a_real_file_covers_a_real_models_layers(shared: Path) -> None:
    found = read_importance(shared / "data" / "imatrix" / "imatrix4.dat")
    shapes = {}
    for i in range(36):
        sizes = {"self_attn.q": (2048, 2048), "self_attn.k": (256, 2048), "self_attn.v": (256, 2048)}
        sizes |= {"self_attn.o": (2048, 2048), "mlp.gate": (11008, 2048), "mlp.up": (11008, 2048)}
        sizes |= {"mlp.down": (2048, 11008)}
        shapes |= {f"model.layers.{i}.{n}_proj.weight": s for n, s in sizes.items()}
    matched = match_importance(found, weights(shapes, "qwen2", hidden_size=2048))
    assert len(matched.values) == 252 and not matched.unmatched and not matched.uncovered and not matched.no_data


LINEAR = {
    L + "linear_attn.out_proj.weight": (8, 8),
    L + "linear_attn.in_proj_qkv.weight": (16, 8),
    L + "linear_attn.A_log": (4,),
}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_next"])
def test_value_heads_that_llama_cpp_reorders_go_back_to_their_places(model_type: str) -> None:
    config = {"model_type": model_type, **HEADS}
    # two channels a head: the first heads of both key heads come first there
    found = match_importance(entries({"0.ssm_out": [1, 1, 3, 3, 2, 2, 4, 4]}), weights(LINEAR, model_type), config)
    expected = [1, 1, 2, 2, 3, 3, 4, 4] if model_type != "qwen3_next" else [1, 1, 3, 3, 2, 2, 4, 4]
    np.testing.assert_array_equal(found.values[L + "linear_attn.out_proj.weight"], np.float32(expected))


def test_heads_that_do_not_fit_the_columns_are_refused() -> None:
    config = {"model_type": "qwen3_5_text", "linear_num_key_heads": 3, "linear_num_value_heads": 4}
    with pytest.raises(CheckpointError, match="3 key heads and 4 value heads"):
        match_importance(entries({"0.ssm_out": range(1, 9)}), weights(LINEAR, "qwen3_5_text"), config)


def test_importance_under_llama_cpp_s_names_is_the_same_when_it_comes_back() -> None:
    config = {"model_type": "qwen3_5_text", **HEADS}
    everything = weights(LINEAR | DENSE, "qwen3_5_text")
    values = {L + "linear_attn.out_proj.weight": np.arange(1, 9, dtype=np.float32)}
    values[L + "mlp.down_proj.weight"] = np.float32([4, 3, 2, 1])
    counts = {name: np.asarray(7) for name in values}
    spelled = spelled_for_llama(Importance(values, counts, datasets=("wiki",)), everything, config)
    assert set(spelled.values) == {"blk.0.ssm_out.weight", "blk.0.ffn_down.weight"} and spelled.spelling == "gguf"
    assert spelled.values["blk.0.ssm_out.weight"].tolist() == [1, 2, 5, 6, 3, 4, 7, 8]
    found = match_importance(spelled, everything, config)
    for name, array in values.items():
        np.testing.assert_array_equal(found.values[name], array)


def test_importance_of_a_model_without_names_in_llama_cpp_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no names"):
        spelled_for_llama(Importance({}, {}), weights(DENSE, "qwen3"), {})
