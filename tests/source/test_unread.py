"""Methods of others and packed codes: never taken for plain weights, whatever config.json says or does not say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.api import respelling
from halfbyte.errors import PlanError
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.overview import overview
from halfbyte.source.unread import unread_codes
from small_models import DENSE_CONFIG, Tensors, dense_tensors, run, write_checkpoint

Pack = Callable[[str, int, int], Tensors]


def ones(kind: Any, *shape: int) -> np.ndarray:
    return np.ones(shape, kind)


PACKINGS: dict[str, Pack] = {
    "gptq": lambda m, n, k: {
        f"{m}.qweight": ones(np.int32, k // 8, n),
        f"{m}.qzeros": ones(np.int32, k // 32, n // 8),
        f"{m}.scales": ones(np.float16, k // 32, n),
        f"{m}.g_idx": ones(np.int32, k),
    },
    "awq": lambda m, n, k: {
        f"{m}.qweight": ones(np.int32, k, n // 8),
        f"{m}.qzeros": ones(np.int32, k // 32, n // 8),
        f"{m}.scales": ones(np.float16, k // 32, n),
    },
    "bitsandbytes-4": lambda m, n, k: {
        f"{m}.weight": ones(np.uint8, n * k // 2, 1),
        f"{m}.weight.absmax": ones(np.float32, n * k // 64),
        f"{m}.weight.quant_map": ones(np.float32, 16),
        f"{m}.weight.quant_state.bitsandbytes__nf4": ones(np.uint8, 80),
    },
    "bitsandbytes-8": lambda m, n, k: {f"{m}.weight": ones(np.int8, n, k), f"{m}.SCB": ones(np.float32, n)},
    "quanto": lambda m, n, k: {f"{m}.weight._data": ones(np.int8, n, k), f"{m}.weight._scale": ones(np.float32, n, 1)},
    "hqq": lambda m, n, k: {
        f"{m}.W_q": ones(np.uint8, n * k // 128, 64),
        f"{m}.scale": ones(np.float16, 1, 64),
        f"{m}.zero": ones(np.float16, 1, 64),
    },
    "aqlm": lambda m, n, k: {
        f"{m}.codes": ones(np.int16, n, k // 8, 1),
        f"{m}.codebooks": ones(np.float16, 1, 16, 1, 8),
        f"{m}.scales": ones(np.float16, n, 1, 1, 1),
    },
    "eetq": lambda m, n, k: {f"{m}.weight": ones(np.int8, k, n), f"{m}.weight_scales": ones(np.float16, n)},
    "fbgemm_fp8": lambda m, n, k: {
        f"{m}.weight": ones(ml_dtypes.float8_e4m3fn, n, k),
        f"{m}.weight_scale": ones(np.float32, n, 1),
    },
    "fp8": lambda m, n, k: {
        f"{m}.weight": ones(ml_dtypes.float8_e4m3fn, n, k),
        f"{m}.weight_scale_inv": ones(np.float32, -(-n // 128), -(-k // 128)),
    },
    "bitnet": lambda m, n, k: {f"{m}.weight": ones(np.uint8, n // 4, k), f"{m}.weight_scale": ones(np.float32, 1)},
    "exl2": lambda m, n, k: {f"{m}.q_weight": ones(np.int32, k // 8, n), f"{m}.q_scale": ones(np.int32, 4, n // 8)},
    "exl3": lambda m, n, k: {f"{m}.trellis": ones(np.int16, k // 16, n // 16, 48), f"{m}.suh": ones(np.float16, k)},
    "uint32": lambda m, n, k: {f"{m}.weight": ones(np.uint32, n, k // 8), f"{m}.scales": ones(np.float16, n, k // 32)},
}


def packed(folder: Path, method: str, config: dict[str, Any] | None = None, rename: str = "") -> Path:
    tensors: Tensors = {}
    for name, array in dense_tensors().items():
        if "_proj.weight" in name:
            module = name.removesuffix(".weight")
            tensors |= PACKINGS[method](f"{rename}{module}", *array.shape)
        else:
            tensors[f"{rename}{name}"] = array
    return write_checkpoint(folder, tensors, DENSE_CONFIG | (config or {}))


@pytest.mark.parametrize("rename", ["", "strange.place."])
@pytest.mark.parametrize("method", PACKINGS)
def test_codes_without_a_configuration_are_refused_and_not_vouched_for(
    method: str, rename: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(packed(tmp_path, method, rename=rename))
    found = overview(checkpoint)
    assert found.packed and found.dialect is None
    with pytest.raises(PlanError, match="packed codes"):
        make_plan(checkpoint, "nvfp4")
    with pytest.raises(PlanError, match="packed codes"):
        respelling(str(tmp_path), "halfbyte")


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "quark", "something_new"])
def test_the_method_of_a_configuration_is_named(method: str, tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": method}}
    checkpoint = Checkpoint.open(packed(tmp_path, "gptq", settings))
    assert overview(checkpoint).method == method
    for attempt in (lambda: make_plan(checkpoint, "nvfp4"), lambda: respelling(str(tmp_path), "halfbyte")):
        with pytest.raises(PlanError, match=f"quantized by '{method}', which cannot be read"):
            attempt()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"w_bit": 4, "zero_point": True}, r"without a name \(w_bit, zero_point\)"),
    ],
)
def test_a_configuration_without_a_method_is_named_too(settings: Any, named: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, dense_tensors(), DENSE_CONFIG | {"quantization_config": settings})
    with pytest.raises(PlanError, match=named):
        make_plan(Checkpoint.open(source), "nvfp4")


@pytest.mark.parametrize(
    "place",
    [
        ("llm_config",),
        ("language_config",),
        ("thinker_config", "text_config"),
        ("audio",),
        ("parts", "deeper", "decoder"),
        ("models", 0),
    ],
)
def test_a_configuration_is_seen_wherever_it_stands(place: tuple[str | int, ...], tmp_path: Path) -> None:
    inner: Any = {"model_type": "qwen3", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    for key in reversed(place):
        inner = [inner] if isinstance(key, int) else {key: inner}
    source = write_checkpoint(tmp_path, dense_tensors(), {"model_type": "some_vl", **inner})
    checkpoint = Checkpoint.open(source)
    assert overview(checkpoint).method == "gptq"
    with pytest.raises(PlanError, match="quantized by 'gptq'"):
        make_plan(checkpoint, "nvfp4")


@pytest.mark.parametrize("place", ["text_config", "audio", "parts"])
def test_a_readable_configuration_is_read_and_taken_out_wherever_it_stands(place: str, tmp_path: Path) -> None:
    run(write_checkpoint(tmp_path / "m", dense_tensors(), DENSE_CONFIG), tmp_path / "q", "nvfp4", "compressed-tensors")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "some_vl", place: [config] if place == "parts" else config}))
    plan = respelling(str(tmp_path / "q"), "halfbyte")
    assert plan.config is not None and b"compressed-tensors" not in plan.config


def test_codes_that_a_read_configuration_does_not_cover_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m", dense_tensors(), DENSE_CONFIG)
    run(source, tmp_path / "q", "nvfp4", "compressed-tensors")
    tensors = PACKINGS["gptq"]("model.layers.7.self_attn.q_proj", 128, 128)
    from small_models import read_file, write_file

    write_file(tmp_path / "q" / "model.safetensors", read_file(tmp_path / "q") | tensors)
    with pytest.raises(PlanError, match="does not cover"):
        respelling(str(tmp_path / "q"), "halfbyte")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("model.layers.0.mlp.gate.tid2eid", np.zeros((64, 2), np.int32)),
        ("vision.embeddings.position_ids", np.zeros((1, 64), np.int64)),
        ("model.positions", np.zeros((1, 64), np.int32)),
        ("model.layers.0.attn.bias", np.ones((1, 1, 8, 8), np.uint8)),
        ("d2t", np.zeros(32, np.int64)),
        ("t2d", np.zeros(32, np.bool_)),
    ],
)
def test_indices_and_masks_are_no_codes(name: str, array: np.ndarray, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, dense_tensors() | {name: array}, DENSE_CONFIG)
    checkpoint = Checkpoint.open(source)
    assert not list(unread_codes(checkpoint))
    make_plan(checkpoint, "nvfp4")


def test_a_model_of_vision_alone_is_named(tmp_path: Path) -> None:
    shapes = {"blocks.0.attn.qkv.weight": (96, 32), "blocks.0.mlp.linear_fc1.weight": (64, 32)}
    tensors = {f"model.visual.{name}": np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors, {"model_type": "siglip_vision_model"}))
    assert overview(checkpoint).vision_only
    with pytest.raises(PlanError, match="vision model and no language model"):
        make_plan(checkpoint, "nvfp4")
