from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import emulated_activations as module
from halfbyte.evaluate import evaluate
from halfbyte.evaluate.emulated_activations import FORMATS, round_activations, rounded
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear, recipe, run

DEMO = Path(halfbyte.__file__).parent / "demo_model"


@pytest.fixture(scope="session")
def w4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("activations") / "w4"
    run(DEMO, path, linear("nvfp4"))
    return path


def codec(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(halfbyte.encode(x.numpy(), FORMATS[name], "absmax").decode())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("spread", [1e-30, 1.0, 1e30])
def test_rounding_equals_the_codec_bit_for_bit(name: str, spread: float) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_t(2, (64, 256)) * rng.lognormal(0, 3, (64, 256)) * spread).astype(np.float32)
    values[3, :64] = 0
    values[5] = 0
    values[7, 16:32] = np.arange(16) / 4 * spread  # ties
    x = torch.from_numpy(values)
    assert torch.equal(rounded(x, name), codec(x, name))


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_equals_the_codec_on_activations_of_a_large_model(name: str, shared: Path) -> None:
    folder = shared / "data" / "qwen36_activations" / "qwen36_gdn_layer_35b"
    bits = np.load(folder / "hidden_in.npy")
    x = torch.from_numpy(bits.astype(np.int32) << 16).view(torch.float32).reshape(-1, bits.shape[-1])
    assert x.shape[1] == 2048 and torch.isfinite(x).all()
    assert torch.equal(rounded(x, name), codec(x, name))


def test_a_given_tensor_scale_is_used_and_saturates() -> None:
    x = torch.linspace(-4, 4, 64).reshape(1, 64)
    expected = halfbyte.encode(x.numpy(), "nvfp4", "absmax", global_scale=1e-3).decode()
    assert torch.equal(rounded(x, "nvfp4", 1e-3), torch.from_numpy(expected))
    assert rounded(x, "nvfp4", 1e-3).max() == pytest.approx(6 * 448e-3)


def test_the_dtype_of_the_input_is_kept() -> None:
    assert rounded(torch.ones(2, 3, 32, dtype=torch.bfloat16), "fp8").dtype == torch.bfloat16


def test_channels_that_do_not_fill_blocks_are_refused() -> None:
    with pytest.raises(HalfbyteError, match="blocks of 32"):
        rounded(torch.ones(1, 48), "mxfp4")


def test_inputs_of_linear_layers_and_of_both_products_of_experts_are_rounded(
    w4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = halfbyte.load(w4, "float32")
    layers = round_activations(model, Checkpoint.open(w4), "nvfp4")
    seen: list[int] = []
    monkeypatch.setattr(module, "rounded", lambda x, name, scale=None: (seen.append(x.shape[-1]), x)[1])
    with torch.inference_mode():
        model(input_ids=torch.arange(8)[None])
    config = model.config.get_text_config()
    assert layers < len(seen)  # an expert that no token reaches adds none, each that is reached adds two
    assert {config.hidden_size, config.moe_intermediate_size} <= set(seen)


@pytest.mark.slow
@pytest.mark.parametrize("dequantize", [False, True])
def test_the_narrower_the_activations_the_larger_the_divergence(w4: Path, dequantize: bool) -> None:
    kl = {}
    for name in (None, "fp8", "nvfp4", "mxfp4"):
        more = {"activations": name, "dequantize": dequantize}
        source, row = evaluate(w4, DEMO, length=64, max_tokens=512, **more)  # type: ignore[arg-type]
        assert source["activations"] is None and row["activations"] == name
        kl[name] = row["kl"]["mean"]
    assert kl[None] < kl["nvfp4"] < kl["mxfp4"]
    assert kl["fp8"] == pytest.approx(kl[None], rel=0.1)


def test_a_checkpoint_without_quantized_layers_has_nothing_to_round() -> None:
    with pytest.raises(HalfbyteError, match="no quantized layers"):
        round_activations(halfbyte.load(DEMO), Checkpoint.open(DEMO), "nvfp4")


@pytest.mark.parametrize("fmt", ["mxfp4_hadamard", "mxfp4_duquant"])
def test_inputs_of_rotated_weights_are_rounded_where_they_are_rotated(fmt: str, tmp_path: Path) -> None:
    run(DEMO, tmp_path / "out", recipe({"match": "attention", "format": fmt}))
    checkpoint = Checkpoint.open(tmp_path / "out")
    model = halfbyte.load(tmp_path / "out", dtype="float32", dequantize=True)
    name = next(n for n in checkpoint.formats if n.endswith("o_proj.weight"))
    layer = model.get_submodule(name.removesuffix(".weight").replace("model.language_model.", "model."))
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0)) * torch.linspace(
        0.01, 9, layer.in_features
    )
    plain = layer(x)
    round_activations(model, checkpoint, "mxfp4")
    # the codec of rotated weights rounds rows of inputs in just that way: the Hadamard matrix in both cases here
    expected = torch.from_numpy(halfbyte.encode(x.numpy(), "mxfp4_hadamard", "absmax").decode()) @ layer.weight.T
    assert torch.allclose(layer(x), expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(plain, expected, atol=1e-3 * float(expected.abs().max()))


def test_experts_with_a_rotation_each_are_refused(tmp_path: Path) -> None:
    run(DEMO, tmp_path / "out", recipe({"match": "experts", "format": "mxfp4_duquant"}))
    model = halfbyte.load(tmp_path / "out", dtype="float32", dequantize=True)
    with pytest.raises(HalfbyteError, match="have a rotation each"):
        round_activations(model, Checkpoint.open(tmp_path / "out"), "mxfp4")
