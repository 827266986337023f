"""GGUF files, judged by the library gguf: every tensor, byte and type where llama.cpp looks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dialects.gguf_models import CONFIGS, EXPERTS, HEAD, HEADS, INTER, KEYS, checkpoint, tensors
from halfbyte.checkpoint import Inventory, Reader
from halfbyte.convert.conversion import convert, source_bytes
from halfbyte.dialects.gguf_blocks import BLOCKS, pack_blocks, unpack_blocks
from halfbyte.dialects.gguf_file import _alike
from halfbyte.dialects.gguf_rows import RowOrder
from halfbyte.errors import CheckpointError, HalfbyteError, PlanError
from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.plan.build import make_plan
from halfbyte.search import encode
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import hashes, linear, read_file, recipe, run, write_checkpoint, write_file

gguf = pytest.importorskip("gguf")

MODELS = tuple(CONFIGS)
FORMATS = tuple(BLOCKS)


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def dequantized(tensor: Any) -> Any:
    """As the library decodes a tensor."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        return tensor.data.view(ml_dtypes.bfloat16).astype(np.float32)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("name", FORMATS)
def test_the_library_decodes_blocks_to_the_same_values(name: str) -> None:
    x = np.random.default_rng(1).standard_t(4, (3, 16, 128)).astype(np.float32)
    tensor = encode(x, get_format(name), "absmax")
    if tensor.global_scale is not None:
        tensor.global_scale = np.ones_like(tensor.global_scale)
    blocks = pack_blocks(tensor)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[BLOCKS[name].ggml])
    np.testing.assert_array_equal(values, tensor.decode())


@pytest.mark.parametrize("name", FORMATS)
def test_every_byte_of_a_block_is_read_as_the_library_reads_it(name: str) -> None:
    fmt, block = get_format(name), BLOCKS[name]
    blocks = np.random.default_rng(2).integers(0, 256, (64, block.nbytes * 2), dtype=np.uint8)
    # not a number in E8M0, E4M3 and FP16; negative FP16 scales are llama.cpp's own
    heads = blocks.reshape(64, 2, block.nbytes)[..., : block.scales * block.scale_bytes]
    heads &= 0x3F
    codes, scales = unpack_blocks(blocks, fmt, (64, 2 * block.weights))
    parts: dict[str, Any] = {"global_scale": np.ones((), np.float32)} if name == "nvfp4" else {}
    tensor = QuantizedTensor(fmt, (64, 2 * block.weights), codes, scales, **parts)
    np.testing.assert_array_equal(
        tensor.decode(), gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[block.ggml])
    )
    np.testing.assert_array_equal(pack_blocks(tensor), blocks)


@pytest.mark.parametrize("model", MODELS)
def test_files_have_the_planned_bytes_and_verify(model: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", model)
    plan = run(source, tmp_path / "out", linear("mxfp4"), "gguf")
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["halfbyte.json", "m-test.gguf"]
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) == plan.repository_bytes
    result = verify(tmp_path / "out", source)
    assert result.ok, result.problems
    assert result.quantized + result.kept == len(Checkpoint.open(source).weights)


@pytest.mark.parametrize("model", MODELS)
def test_tensors_lie_where_the_library_finds_them(model: str, tmp_path: Path) -> None:
    plan = run(checkpoint(tmp_path / "m", model), tmp_path / "out", linear("q8_0"), "gguf")
    found = stored(tmp_path / "out" / "m-test.gguf")
    placed = [item for shard in plan.shards for item in shard.items]
    planned = {o.name: at for i in placed for o, at in zip(i.outputs, i.offsets, strict=True)}
    assert {name: int(t.data_offset) for name, t in found.items() if name != "rope_freqs.weight"} == planned


@pytest.mark.parametrize("model", MODELS)
def test_the_library_decodes_every_tensor_to_our_values(model: str, tmp_path: Path) -> None:
    run(checkpoint(tmp_path / "m", model), tmp_path / "out", linear("mxfp4"), "gguf")
    found = stored(tmp_path / "out" / "m-test.gguf")
    ours = Checkpoint.open(tmp_path / "out")
    with Reader(ours.inventory) as reader:
        for weight in ours.weights:
            values = np.asarray(ours.read(reader, weight)).astype(np.float32)
            parts = [dequantized(found[name]) for name in ours.tensors_of(weight)]
            if model == "llama" and ("q_proj" in weight.name or "k_proj" in weight.name):
                heads = HEADS if "q_proj" in weight.name else KEYS
                # llama.cpp's converter turns rows so
                values = values.reshape(heads, 2, HEAD // 2, -1).swapaxes(1, 2).reshape(parts[0].shape)
            elif len(parts) > 1:
                axis = -1 if weight.name.endswith("_bias") else -2
                halves = np.split(values, 2, axis=axis)
                if model == "gpt-oss":
                    index = [np.arange(i, values.shape[axis], 2) for i in (0, 1)]
                    halves = [np.take(values, rows, axis=axis) for rows in index]
                np.testing.assert_array_equal(parts[1], halves[1])
                values = halves[0]
            np.testing.assert_array_equal(parts[0], values, err_msg=weight.name)


def test_the_tensor_scale_of_nvfp4_lies_beside_each_projection(tmp_path: Path) -> None:
    run(checkpoint(tmp_path / "m", "qwen3moe"), tmp_path / "out", linear("nvfp4"), "gguf")
    found = stored(tmp_path / "out" / "m-test.gguf")
    gate, up = (found[f"blk.0.ffn_{p}_exps.scale"].data for p in ("gate", "up"))
    assert gate.shape == (EXPERTS,)
    np.testing.assert_array_equal(gate, up)
    assert found["blk.0.attn_q.scale"].data.shape == (1,)
    ours = Checkpoint.open(tmp_path / "out")
    weight = next(w for w in ours.weights if w.name == "model.layers.0.mlp.experts.gate_up_proj")
    with Reader(ours.inventory) as reader:
        tensor = ours.read_quantized(reader, weight)
    assert tensor.global_scale is not None
    raw = gguf.quants.dequantize(found["blk.0.ffn_up_exps.weight"].data, gguf.GGMLQuantizationType.NVFP4)
    values = tensor.decode()[:, INTER:]
    # the product is rounded at another place: scale x global scale here, values x global scale there
    np.testing.assert_allclose(raw * up[:, None, None], values, rtol=3e-7)


def test_types_are_those_of_the_converter(tmp_path: Path) -> None:
    run(checkpoint(tmp_path / "m", "gpt-oss"), tmp_path / "out", linear("mxfp4"), "gguf")
    types = {name: t.tensor_type.name for name, t in stored(tmp_path / "out" / "m-test.gguf").items()}
    fp32 = ("norm", "bias", "sinks", "gate_inp")
    assert {kind for name, kind in types.items() if any(word in name for word in fp32)} == {"F32"}
    assert types["token_embd.weight"] == types["output.weight"] == "BF16"
    assert types["blk.0.ffn_gate_exps.weight"] == types["blk.1.attn_q.weight"] == "MXFP4"


def test_kept_weights_keep_every_value(tmp_path: Path) -> None:
    only = recipe({"match": "attention.o", "format": "q4_0", "scale_search": "absmax"})
    source = checkpoint(tmp_path / "m", "gpt-oss")
    run(source, tmp_path / "out", only, "gguf")
    found = stored(tmp_path / "out" / "m-test.gguf")
    gate_up = tensors("gpt-oss")["model.layers.1.mlp.experts.gate_up_proj"].astype(np.float32).swapaxes(1, 2)
    np.testing.assert_array_equal(dequantized(found["blk.1.ffn_gate_exps.weight"]), gate_up[:, 0::2])
    np.testing.assert_array_equal(dequantized(found["blk.1.ffn_up_exps.weight"]), gate_up[:, 1::2])
    assert verify(tmp_path / "out", source).ok


def test_bytes_do_not_depend_on_how_a_weight_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "m", "llama")
    run(source, tmp_path / "whole", linear("nvfp4"), "gguf")
    place = RowOrder.place
    # rows that are no whole heads: 8 at a time
    monkeypatch.setattr(
        RowOrder,
        "place",
        lambda self, output, part, first: (
            written for i in range(0, len(part), 8) for written in place(self, output, part[i : i + 8], first + i)
        ),
    )
    run(source, tmp_path / "cut", linear("nvfp4"), "gguf", threads=2)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "cut")


def test_rows_of_a_rotated_weight_are_read_from_the_middle_of_a_head(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", "llama")
    run(source, tmp_path / "out", linear("mxfp4"), "gguf")
    ours = Checkpoint.open(tmp_path / "out")
    weight = next(w for w in ours.weights if w.name == "model.layers.0.self_attn.q_proj.weight")
    with Reader(ours.inventory) as reader:
        whole = ours.read(reader, weight)
        np.testing.assert_array_equal(ours.read(reader, weight, 24, 72), whole[24:72])


def test_a_split_model_verifies_and_names_its_parts(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", "llama")
    plan = run(source, tmp_path / "out", linear("mxfp4"), "gguf", max_shard_bytes=100_000)
    names = [f"m-test-{i + 1:05d}-of-{len(plan.shards):05d}.gguf" for i in range(len(plan.shards))]
    assert [shard.name for shard in plan.shards] == names
    assert len(names) > 2
    counts = []
    for i, name in enumerate(names):
        reader = gguf.GGUFReader(tmp_path / "out" / name)
        counts.append(len(reader.tensors))
        assert reader.fields["split.no"].contents() == i
        assert reader.fields["split.count"].contents() == len(names)
    assert gguf.GGUFReader(tmp_path / "out" / names[0]).fields["split.tensors.count"].contents() == sum(counts)
    assert verify(tmp_path / "out", source).ok
    assert len(Inventory.open(tmp_path / "out" / names[1]).tensors) == sum(counts)
    (tmp_path / "out" / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{names[1]} is missing"):
        Inventory.open(tmp_path / "out")


def test_an_interrupted_conversion_continues_with_the_same_bytes(tmp_path: Path) -> None:
    plan = make_plan(
        Checkpoint.open(checkpoint(tmp_path / "m", "llama")), linear("mxfp4"), "gguf", max_shard_bytes=100_000
    )
    convert(plan, tmp_path / "whole", threads=1)
    left = source_bytes(plan) // 2

    def stop(done: int) -> None:
        nonlocal left
        left -= done
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, tmp_path / "out", threads=1, progress=stop)
    assert not (tmp_path / "out" / "halfbyte.json").exists()
    assert 0 < convert(plan, tmp_path / "out", threads=1).resumed_shards < len(plan.shards)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "out")


def test_quantized_experts_of_gpt_oss_keep_their_codes(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", "gpt-oss")
    run(source, tmp_path / "mx", recipe({"match": "experts", "format": "mxfp4", "scale_search": "absmax"}), "gpt-oss")
    (tmp_path / "mx" / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    plan = run(tmp_path / "mx", tmp_path / "out", recipe({"match": "experts", "format": "mxfp4"}), "gguf")
    assert {i.action for i in plan.items if "experts" in i.weight.role} == {"transcode"}
    result = verify(tmp_path / "out", tmp_path / "mx")
    assert result.ok, result.problems
    assert result.lossless == 4


@pytest.mark.parametrize("dialect", ["halfbyte", "compressed-tensors", "modelopt"])
@pytest.mark.parametrize("model", ["llama", "qwen3moe"])
def test_quantized_sources_keep_their_codes(model: str, dialect: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", model)
    run(source, tmp_path / "nv", linear("nvfp4"), dialect)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "nv" / name).write_bytes((source / name).read_bytes())
    run(tmp_path / "nv", tmp_path / "out", linear("nvfp4"), "gguf")
    result = verify(tmp_path / "out", tmp_path / "nv")
    assert result.ok, result.problems
    # the reciprocal of a divisor is rounded
    assert result.relmse < (1e-12 if dialect == "compressed-tensors" else 1e-30)
    assert verify(tmp_path / "out", source).ok


def test_rope_factors_are_those_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    run(checkpoint(tmp_path / "m", "llama"), tmp_path / "out", linear("mxfp4"), "gguf")
    config = transformers.LlamaConfig(**CONFIGS["llama"])
    scaled, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, HEAD, 2) / HEAD)
    factors = stored(tmp_path / "out" / "m-test.gguf")["rope_freqs.weight"].data
    np.testing.assert_allclose(factors, (plain / scaled).numpy(), rtol=1e-5)


def test_verify_notices_other_metadata_and_other_values(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", "qwen3")
    plan = run(source, tmp_path / "out", linear("mxfp4"), "gguf")
    path = tmp_path / "out" / "m-test.gguf"
    content = bytearray(path.read_bytes())
    at = content.index(b"qwen3.rope.freq_base") + len(b"qwen3.rope.freq_base") + 4
    content[at : at + 4] = np.float32(12345).tobytes()
    placed = [item for shard in plan.shards for item in shard.items]
    norm = next(i for i in placed if i.weight.name == "model.norm.weight")
    content[norm.offsets[0]] ^= 1
    path.write_bytes(content)
    problems = " ".join(verify(tmp_path / "out", source).problems)
    assert "qwen3.rope.freq_base" in problems
    assert "model.norm.weight" in problems


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    run(checkpoint(tmp_path / "m", "qwen3"), tmp_path / "out", linear("mxfp4"), "gguf")
    path = tmp_path / "out" / "m-test.gguf"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"GGUF", b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"m-test\.gguf"):
            Inventory.open(path)


def test_gguf_is_no_source_of_a_conversion(tmp_path: Path) -> None:
    run(checkpoint(tmp_path / "m", "qwen3"), tmp_path / "out", linear("mxfp4"), "gguf")
    with pytest.raises(PlanError, match="start from the original checkpoint"):
        make_plan(Checkpoint.open(tmp_path / "out"), linear("mxfp4"), "halfbyte")


def test_plans_say_what_is_left_out(tmp_path: Path) -> None:
    plan = make_plan(Checkpoint.open(checkpoint(tmp_path / "m", "qwen3")), linear("mxfp4"), "gguf")
    notes = " ".join(plan.notes)
    assert "not written" in notes and "generation_config.json" in notes
    assert "NFC" in notes


@pytest.mark.parametrize(
    ("model", "config", "rule", "message"),
    [
        ("qwen3", {"architectures": ["Gemma3ForCausalLM"]}, {}, "LlamaForCausalLM.*this checkpoint is Gemma3"),
        ("qwen3", {}, {"format": "mixfp4"}, "no type for mixfp4"),
        ("qwen3moe", {}, {"match": "router", "format": "q8_0"}, "ffn_gate_inp.weight in FP32"),
        ("qwen3", {}, {"match": "embedding", "format": "nvfp4"}, "no global scale to token_embd.weight"),
        ("gpt-oss", {}, {"match": "experts", "format": "nvfp4"}, "applies no global scale to blk.0.ffn"),
        ("qwen3moe", {"norm_topk_prob": False}, {}, "norm_topk_prob"),
        ("llama", {"hidden_act": "gelu"}, {}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, {}, "longrope"),
        ("gpt-oss", {"layer_types": ["full_attention"] * 2}, {}, "layer_types"),
        ("llama", {"max_position_embeddings": None}, {}, "max_position_embeddings"),
    ],
)
def test_refusals(model: str, config: dict[str, Any], rule: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", model, **config)
    rules = {"match": "attention", "format": "mxfp4", "scale_search": "absmax", **rule}
    with pytest.raises(HalfbyteError, match=message):
        make_plan(Checkpoint.open(source), recipe(rules), "gguf")


def test_a_weight_without_a_place_is_named(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", "qwen3")
    found = read_file(source) | {"model.layers.0.extra.weight": np.ones((4, 4), np.float32)}
    write_file(source / "model.safetensors", found)
    with pytest.raises(PlanError, match=r"no tensor for model\.layers\.0\.extra\.weight"):
        make_plan(Checkpoint.open(source), linear("mxfp4"), "gguf")


def test_buffers_are_left_out_with_a_reason(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_file(source / "model.safetensors", read_file(source) | {name: np.ones(16, np.float32)})
    run(source, tmp_path / "out", linear("mxfp4"), "gguf")
    result = verify(tmp_path / "out", source)
    assert result.ok, result.problems
    assert "llama.cpp" in result.dropped[name]


def test_nvfp4_blocks_need_64_columns(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", "qwen3")
    name = "model.layers.0.mlp.down_proj.weight"
    found = read_file(source)
    found[name] = found[name][:, :96].copy()
    write_file(source / "model.safetensors", found)
    with pytest.raises(HalfbyteError, match="96 is not a multiple of the 64"):
        make_plan(Checkpoint.open(source), linear("nvfp4"), "gguf")
    run(source, tmp_path / "out", linear("nvfp4", if_not_divisible="keep"), "gguf")
    assert verify(tmp_path / "out", source).ok
    assert stored(tmp_path / "out" / "m-test.gguf")["blk.0.ffn_down.weight"].tensor_type.name == "BF16"


def test_without_files_there_is_no_tokenizer(tmp_path: Path) -> None:
    listed = {name: ["BF16", list(array.shape)] for name, array in tensors("qwen3").items()}
    path = tmp_path / "inventory.json"
    path.write_text(json.dumps({"config": CONFIGS["qwen3"], "tensors": listed}))
    with pytest.raises(PlanError, match="holds the tokenizer"):
        make_plan(Checkpoint(Inventory.from_json(path)), linear("mxfp4"), "gguf")


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m", tensors("qwen3"), CONFIGS["qwen3"])
    (source / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match=r"no tokenizer\.json"):
        make_plan(Checkpoint.open(source), linear("mxfp4"), "gguf")


def test_several_models_in_a_folder_are_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="several GGUF models"):
        Inventory.open(tmp_path)


@pytest.mark.parametrize("value", ["", "a", ["a", "b"], [[1], []], float("nan"), 2**63, True, None])
def test_metadata_of_another_type_is_a_difference_and_no_exception(value: Any) -> None:
    assert not _alike(value, 1e-6) and not _alike(value, [0.5, 1.0])
    assert _alike(1e-6, 1e-6) and _alike([0.5, 1], [0.5, 1.0]) and not _alike([0.5], [0.5, 1.0])
