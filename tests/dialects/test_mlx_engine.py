"""MLX and mlx-lm judge the MLX dialect: values by ``mx.dequantize``, logits by its models, and its own checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="MLX is not installed")

import mlx.core as mx
from mlx_lm import generate
from mlx_lm.utils import load_model, load_tokenizer

from dialects.mlx_judge import TOKENS, convert_with_mlx, count_equal, dequantize, logits
from formats.streams import random_bytes
from halfbyte.demo import MODEL
from halfbyte.dialects import get_dialect
from halfbyte.formats import QuantizedTensor, get_format, list_formats
from halfbyte.models import Piece, Weight
from halfbyte.verify.weights import verify
from small_models import read_file, recipe, run, write_checkpoint

MLX = get_dialect("mlx")
STACK = Weight("m.mlp.experts.down_proj", "experts.down", 0, (3, 8, 256), "BF16", (Piece("m.mlp.experts.down_proj"),))
FORMATS = [name for name in list_formats() if MLX.spelling.problem(STACK, get_format(name)) is None]
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 50_000.0}
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {
        **SIZES,
        "intermediate_size": 256,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "Qwen3": {**SIZES, "intermediate_size": 256, "rope_parameters": ROPE},
    "Qwen3Moe": {
        **SIZES,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "rope_parameters": ROPE,
    },
    "GptOss": {
        **SIZES,
        **EXPERTS,
        "intermediate_size": 64,
        "sliding_window": 16,
        "rope_parameters": {
            **ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    },
}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "affine": [{"match": "linear", "format": "affine4"}, {"match": ["embedding", "lm_head"], "format": "affine6"}],
    "mixed": [{"match": "linear", "format": "mxfp8"}, {"match": "attention.o", "format": "affine3_g32"}],
    "mx": [{"match": "linear", "format": "mxfp4"}],
    "nvfp4": [{"match": "linear", "format": "nvfp4_unscaled"}],
    "attention": [{"match": "attention", "format": "affine8"}],
}


def recipe_of(name: str, tied: bool) -> Any:
    rules = [{**rule, "scale_search": "absmax"} for rule in RECIPES[name]]
    for rule in rules:
        if tied and "lm_head" in rule["match"]:
            rule["match"] = "embedding"
    return recipe(*rules)


def close(a: Any, b: Any) -> bool:
    """FP32 rounding of a few layers; a wrong weight shows in the first digits."""
    return bool(np.abs(a - b).max() < 1e-4 * np.abs(b).max())


def our_logits(folder: Path) -> Any:
    torch = pytest.importorskip("torch")
    from halfbyte.runtime import load

    with torch.no_grad():
        return load(folder, dtype="float32")(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each class, in FP32 so that no rounding hides anything."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    found = {}
    for name, settings in MODELS.items():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        found[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(found[name])
    found["Qwen3_5Moe"] = tmp_path_factory.mktemp("models") / "demo"
    tensors = {n: a.astype(np.float32) for n, a in read_file(MODEL).items()}
    write_checkpoint(found["Qwen3_5Moe"], tensors, json.loads((MODEL / "config.json").read_text()))
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_random_words_decode_as_in_mlx(name: str) -> None:
    fmt = get_format(name)
    parts = fmt.parts(STACK.shape)
    tensor = QuantizedTensor(
        fmt,
        STACK.shape,
        random_bytes(parts["codes"][1], 1),
        random_bytes(parts["scales"][1], 2, 1, 126),
    )
    if name == "mxfp8":
        tensor.codes[(tensor.codes & 127) == 127] = 0
    if "offsets" in parts:
        kind = parts["scales"][0]
        tensor.scales = (random_bytes(parts["scales"][1], 2) / np.float32(999) - np.float32(0.1)).astype(kind)
        tensor.offsets = (random_bytes(parts["scales"][1], 3) / np.float32(77) - np.float32(1.5)).astype(kind)
    if "global_scale" in parts:
        tensor.global_scale = np.exp2(np.arange(-4, -1)).astype(np.float32)
    outputs = MLX.spelling.outputs(STACK, fmt)
    arrays = {w.output.name.rpartition(".")[2]: w.array for w in MLX.spelling.write(outputs, fmt, tensor, 0, 0)}
    assert np.array_equal(dequantize(arrays, fmt), tensor.decode())


@pytest.mark.slow
@pytest.mark.parametrize("what", RECIPES)
@pytest.mark.parametrize("model", [*MODELS, "Qwen3_5Moe"])
def test_logits_of_mlx_lm_are_those_of_the_decoded_weights(
    tmp_path: Path, sources: dict[str, Path], model: str, what: str
) -> None:
    source, out = sources[model], tmp_path / "out"
    run(source, out, recipe_of(what, model == "Llama"), "mlx")
    assert count_equal(out) > 0
    assert close(logits(out), our_logits(out))
    assert verify(out, source, max_relmse=0.2).ok


def test_a_global_scale_of_experts_decodes_as_in_mlx(tmp_path: Path, sources: dict[str, Path]) -> None:
    run(sources["Qwen3_5Moe"], tmp_path / "out", recipe({"match": "experts", "format": "nvfp4"}), "mlx")
    assert count_equal(tmp_path / "out") == 12


@pytest.mark.parametrize(
    ("model", "mode", "bits", "group"),
    [
        ("Llama", "affine", 3, 32),
        ("Qwen3", "nvfp4", 4, 16),
        ("Qwen3Moe", "affine", 6, 64),
        ("Qwen3_5Moe", "mxfp4", 4, 32),
    ],
)
def test_checkpoints_that_mlx_lm_makes_are_read(
    tmp_path: Path, sources: dict[str, Path], model: str, mode: str, bits: int, group: int
) -> None:
    convert_with_mlx(sources[model], tmp_path / "theirs", mode, bits, group)
    assert count_equal(tmp_path / "theirs") > 10
    assert close(logits(tmp_path / "theirs"), our_logits(tmp_path / "theirs"))


@pytest.mark.slow
def test_a_checkpoint_that_mlx_lm_made_keeps_its_values_in_other_dialects_and_its_own(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    theirs = tmp_path / "theirs"
    convert_with_mlx(sources["Qwen3_5Moe"], theirs, "mxfp4", 4, 32)
    keep = recipe({"match": "experts", "format": "mxfp4"})
    run(theirs, tmp_path / "halfbyte", keep, "halfbyte")
    run(theirs, tmp_path / "mlx", keep, "mlx")
    expected = logits(theirs)
    assert np.array_equal(logits(tmp_path / "mlx"), expected)
    assert close(our_logits(tmp_path / "halfbyte"), expected)
    assert all(verify(tmp_path / name, theirs).ok for name in ("halfbyte", "mlx"))


def test_published_mxfp4_of_gpt_oss_becomes_mlx_without_requantizing(tmp_path: Path, sources: dict[str, Path]) -> None:
    experts = recipe({"match": "experts", "format": "mxfp4", "scale_search": "absmax"})
    run(sources["GptOss"], tmp_path / "published", experts, "gpt-oss")
    plan = run(tmp_path / "published", tmp_path / "out", experts, "mlx")
    assert {i.action for i in plan.items} == {"transcode", "keep"}
    assert close(logits(tmp_path / "out"), our_logits(tmp_path / "published"))


def test_text_is_generated_as_by_the_decoded_model(tmp_path: Path, sources: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    from halfbyte.runtime import load

    run(sources["Qwen3_5Moe"], tmp_path / "out", recipe({"match": "linear", "format": "mxfp4"}), "mlx")
    model, _ = load_model(tmp_path / "out")
    model.set_dtype(mx.float32)
    tokenizer = load_tokenizer(MODEL)
    said = generate(model, tokenizer, "Python is", max_tokens=12)
    tokens = torch.tensor([tokenizer.encode("Python is")])
    ours = load(tmp_path / "out", dtype="float32").generate(tokens, max_new_tokens=12, do_sample=False)
    assert said and said == tokenizer.decode(ours[0, tokens.shape[1] :].tolist())


@pytest.mark.slow
def test_the_server_answers(tmp_path: Path) -> None:
    run(MODEL, tmp_path / "out", recipe({"match": "linear", "format": "affine4"}), "mlx")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(tmp_path / "out"), "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    body = json.dumps({"prompt": "Python is", "max_tokens": 3, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        for _ in range(1200):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(request, timeout=300) as answer:
                    said = json.load(answer)
                break
            except OSError:
                time.sleep(0.25)
    finally:
        server.terminate()
        server.wait(300)
    assert said["usage"]["completion_tokens"] == 3 and said["choices"][0]["text"]
