from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from collected import with_caches
from halfbyte.checkpoint import Inventory, Reader
from halfbyte.dialects.compressed_tensors_config import SCHEMES
from halfbyte.errors import CheckpointError
from halfbyte.formats import list_formats
from halfbyte.source.checkpoint import Checkpoint
from quantized_sources import gpt_oss, gpt_oss_tensors
from small_models import (
    DENSE_CONFIG,
    MOE_CONFIG,
    dense_tensors,
    heavy_tailed,
    linear,
    moe_tensors,
    read_file,
    recipe,
    run,
    write_checkpoint,
)

torch = pytest.importorskip("torch")
from halfbyte.engines import stream  # noqa: E402

pytestmark = pytest.mark.slow

SPELLED = [("halfbyte", name) for name in list_formats()]
SPELLED += [("compressed-tensors", name) for name in SCHEMES]
SPELLED += [("modelopt", name) for name in ("nvfp4", "fp8_channel")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    made = {
        "dense": write_checkpoint(root / "dense", dense_tensors(), DENSE_CONFIG),
        "fused": write_checkpoint(root / "fused", moe_tensors(), MOE_CONFIG),
        "per expert": write_checkpoint(root / "single", moe_tensors(True), MOE_CONFIG),
    }
    return made


def collected(folder: Path, dtype: Any = None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tensor in stream.decoded(Checkpoint.open(folder), dtype or torch.float32, **more):
        assert name not in found
        found[name] = tensor
    return found


@pytest.mark.parametrize("model", ["dense", "fused", "per expert"])
@pytest.mark.parametrize(("dialect", "fmt"), SPELLED)
def test_values_are_those_of_the_checkpoint_under_the_names_of_the_source(
    sources: dict[str, Path], tmp_path: Path, model: str, dialect: str, fmt: str
) -> None:
    run(sources[model], tmp_path / "out", linear(fmt, if_not_divisible="keep"), dialect)
    found = collected(tmp_path / "out")
    plain, packed = (
        Checkpoint.open(sources["per expert" if model == "fused" else model]),
        Checkpoint.open(tmp_path / "out"),
    )
    kept = {name for name in Inventory.open(sources[model]).tensors if name in Inventory.open(tmp_path / "out").tensors}
    assert kept <= found.keys()
    quantized = {weight.name: weight for weight in packed.weights if weight.name in packed.formats}
    assert len(quantized) >= (7 if model == "dense" else 10)
    with Reader(packed.inventory) as reader:
        for weight in (w for w in plain.weights if w.name in quantized):
            values = packed.read(reader, quantized[weight.name])
            for piece in weight.pieces:
                part = values if piece.expert is None else values[piece.expert][slice(*(piece.rows or (None,)))]
                assert np.array_equal(found.pop(piece.source).numpy(), part), piece.source
    assert found.keys() <= kept


def test_quantized_weights_are_rounded_to_the_type_of_the_model_and_others_keep_theirs(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    run(sources["dense"], tmp_path / "out", linear("mixfp4"), "halfbyte")
    exact, half = collected(tmp_path / "out"), collected(tmp_path / "out", torch.float16)
    name = "model.layers.0.mlp.down_proj.weight"
    assert half[name].dtype == torch.float16 and torch.equal(half[name], exact[name].half())
    assert half["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_scales_of_a_kv_cache_come_under_their_names(sources: dict[str, Path], tmp_path: Path, dialect: str) -> None:
    caches = {f"model.layers.{i}.self_attn": {"keys": 1.0, "values": 1.0} for i in range(2)}
    known = with_caches(tmp_path / "s", sources["dense"], caches)
    asked = linear("nvfp4").model_copy(update={"kv_cache": "fp8"})
    plan = halfbyte.plan(sources["dense"], asked, dialect=dialect, importance=known)
    halfbyte.quantize(plan, tmp_path / "out")
    names = {name for name in read_file(tmp_path / "out") if name.endswith((".k_scale", ".v_scale"))}
    found = collected(tmp_path / "out")
    assert len(names) == 4 and found.keys() == read_file(sources["dense"]).keys() | names
    assert {found[name].float().item() for name in names} == {float(torch.tensor(1 / 448).to(found[min(names)].dtype))}


def test_large_matrices_are_decoded_in_slices_to_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = dense_tensors()
    tensors["lm_head.weight"] = heavy_tailed(np.random.default_rng(0), 2500, 128)
    source = write_checkpoint(tmp_path / "source", tensors, DENSE_CONFIG)
    run(source, tmp_path / "out", recipe({"match": "lm_head", "format": "int4_asym_g32"}), "compressed-tensors")
    whole = collected(tmp_path / "out")["lm_head.weight"]
    reads: list[tuple[int, int]] = []
    read = Checkpoint.read

    def spy(self: Checkpoint, reader: Reader, weight: Any, first: int = 0, stop: int | None = None) -> Any:
        reads.append((first, stop or 0))
        return read(self, reader, weight, first, stop)

    monkeypatch.setattr(Checkpoint, "read", spy)
    monkeypatch.setattr(stream, "SLICE", 1000)
    assert torch.equal(collected(tmp_path / "out")["lm_head.weight"], whole)
    assert reads == [(0, 1024), (1024, 2048), (2048, 2500)]


def test_experts_of_the_own_dialect_are_spelled_as_the_family_does(tmp_path: Path) -> None:
    prefix, rng = "model.layers.0.block_sparse_moe.experts", np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": heavy_tailed(rng, 64, 64)}
    for expert in range(2):
        tensors |= {f"{prefix}.{expert}.w{i}.weight": heavy_tailed(rng, 64, 64) for i in (1, 2, 3)}
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64}
    source = write_checkpoint(tmp_path / "source", tensors, {**config, "num_local_experts": 2})
    run(source, tmp_path / "out", linear("nvfp4"), "halfbyte")
    found = collected(tmp_path / "out")
    assert found.keys() == tensors.keys()
    # w1 is gate and w3 is up: each must be near its own source
    for name, tensor in found.items():
        assert np.abs(tensor.float().numpy() - tensors[name].astype(np.float32)).mean() < 0.01, name


@pytest.mark.parametrize("dialect", ["gpt-oss", "halfbyte"])
def test_stacks_of_gpt_oss_stay_whole_and_lie_as_unquantized_ones(tmp_path: Path, dialect: str) -> None:
    source = gpt_oss(tmp_path / "source")
    if dialect == "halfbyte":
        run(source, tmp_path / "own", recipe({"match": "experts", "format": "mxfp4"}), "halfbyte")
        source = tmp_path / "own"
    found, tensors = collected(source), gpt_oss_tensors()
    assert found.keys() == tensors.keys()
    for name in (name for name in tensors if name.endswith("_proj") and "experts" in name):
        assert tuple(found[name].shape) == tensors[name].shape
        assert np.abs(found[name].numpy() - tensors[name].astype(np.float32)).mean() < 0.01


def test_what_a_model_does_not_want_is_not_decoded(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter wants its own layers and the embeddings."""
    run(
        sources["fused"],
        tmp_path / "out",
        recipe({"match": ["linear", "mtp.experts"], "format": "int4_g32"}),
        "halfbyte",
    )
    read, touched = Checkpoint.read, set()

    def spy(self: Checkpoint, reader: Reader, weight: Any, *more: Any) -> Any:
        touched.add(weight.name)
        return read(self, reader, weight, *more)

    monkeypatch.setattr(Checkpoint, "read", spy)
    found = collected(tmp_path / "out", unused=lambda name: not name.startswith("mtp."))
    assert found and all(name.startswith("mtp.") for name in found) and all(n.startswith("mtp.") for n in touched)


def test_scales_of_activations_are_left_out(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["dense"], tmp_path / "out", linear("nvfp4"), "compressed-tensors")
    tensors = read_file(tmp_path / "out")
    tensors["model.layers.0.mlp.down_proj.input_global_scale"] = np.ones(1, np.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = collected(write_checkpoint(tmp_path / "w4a4", tensors, config))
    assert found.keys() == dense_tensors().keys()


@pytest.mark.parametrize(
    ("settings", "said"), [({}, "is not quantized"), ({"quant_method": "gptq"}, "is quantized by 'gptq'")]
)
def test_a_checkpoint_that_halfbyte_does_not_read_is_refused(
    tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    config = {**DENSE_CONFIG, **({"quantization_config": settings} if settings else {})}
    source = write_checkpoint(tmp_path / "source", dense_tensors(), config)
    with pytest.raises(CheckpointError, match=said):
        collected(source)
