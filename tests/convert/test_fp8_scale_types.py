"""Block FP8 with scales of any type and ragged edges: carried over to every dialect that holds it, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.cli import main
from halfbyte.errors import CheckpointError
from quantized_sources import carried, proven, tensors_of, values
from small_models import DENSE_CONFIG, Tensors, linear, read_file, write_checkpoint

E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
DIALECTS = ["halfbyte", "compressed-tensors", "fp8"]
BLOCKS = linear("fp8_block128")


def fp8_blocks(shape: tuple[int, int], kind: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and one scale for every block, those at the edges included; powers of two where the type has no others."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 127) == 127] = 0
    blocks = tuple(-(-n // 128) for n in shape)
    scales = np.exp2(rng.integers(-9, -5, blocks)) if kind == E8M0 else rng.uniform(1e-3, 1e-2, blocks)
    return codes.view(E4M3), scales.astype(kind)


def model(folder: Path, kind: Any, hidden: int, inter: int = 320) -> Path:
    """A dense model of one layer whose Linear weights are FP8 blocks."""
    prefix, kinds = "model.layers.0.", kind if isinstance(kind, list) else [kind]
    shapes = {"self_attn.q": (hidden, hidden), "self_attn.k": (64, hidden), "self_attn.v": (64, hidden)}
    shapes |= {"self_attn.o": (hidden, hidden), "mlp.gate": (inter, hidden), "mlp.up": (inter, hidden)}
    shapes["mlp.down"] = (hidden, inter)
    tensors: Tensors = {"model.embed_tokens.weight": np.ones((8, hidden), ml_dtypes.bfloat16)}
    for i, (part, shape) in enumerate(shapes.items()):
        name = f"{prefix}{part}_proj.weight"
        tensors[name], tensors[f"{name}_scale_inv"] = fp8_blocks(shape, kinds[i % len(kinds)], i)
    config = {**DENSE_CONFIG, "hidden_size": hidden, "num_hidden_layers": 1, "quantization_config": SETTINGS}
    return write_checkpoint(folder, tensors, config)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("hidden", [64, 128, 192, 320])
@pytest.mark.parametrize("kind", [E8M0, np.float32, ml_dtypes.bfloat16, np.float16])
def test_every_value_stays_whatever_the_type_of_scales_and_the_size(
    tmp_path: Path, dialect: str, hidden: int, kind: Any
) -> None:
    source = model(tmp_path / "source", kind, hidden)
    _, results = carried(source, tmp_path / "out", BLOCKS, dialect)
    proven(tmp_path / "out", source, len(results))
    assert len(results) == 7
    before, after = values(source), values(tmp_path / "out")
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dialect", ["halfbyte", "compressed-tensors"])
def test_one_byte_scales_are_written_wide_and_return_as_the_same_numbers(tmp_path: Path, dialect: str) -> None:
    source = model(tmp_path / "source", E8M0, 192)
    carried(source, tmp_path / "there", BLOCKS, dialect)
    _, results = carried(tmp_path / "there", tmp_path / "back", BLOCKS, "fp8")
    proven(tmp_path / "back", tmp_path / "there", len(results))
    before, after = read_file(source), read_file(tmp_path / "back")
    scales = [name for name in before if name.endswith("_scale_inv")]
    assert {after[name].dtype for name in scales} == {np.dtype(np.float32)}
    assert all(np.array_equal(before[name].astype(np.float32), after[name]) for name in scales)


def test_between_two_other_dialects_the_bytes_stay(tmp_path: Path) -> None:
    source = model(tmp_path / "source", E8M0, 192)
    carried(source, tmp_path / "a", BLOCKS, "compressed-tensors")
    carried(tmp_path / "a", tmp_path / "b", BLOCKS, "halfbyte")
    carried(tmp_path / "b", tmp_path / "c", BLOCKS, "compressed-tensors")
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "c")


def test_its_own_dialect_copies_one_byte_scales(tmp_path: Path) -> None:
    source = model(tmp_path / "source", E8M0, 192)
    carried(source, tmp_path / "out", BLOCKS, "fp8")
    assert tensors_of(tmp_path / "out") == tensors_of(source)


def test_each_weight_may_have_scales_of_its_own_type(tmp_path: Path) -> None:
    source = model(tmp_path / "source", [E8M0, np.float32, ml_dtypes.bfloat16], 192)
    _, results = carried(source, tmp_path / "out", BLOCKS)
    proven(tmp_path / "out", source, len(results))


def test_every_power_of_two_survives(tmp_path: Path) -> None:
    source = model(tmp_path / "source", E8M0, 192)
    tensors = read_file(source)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = np.full((192, 192), 0x38, np.uint8).view(E4M3)
    tensors[f"{name}_scale_inv"] = np.array([[0, 1], [126, 253]], np.uint8).view(E8M0)
    write_checkpoint(source, tensors, {**DENSE_CONFIG, "quantization_config": SETTINGS})
    carried(source, tmp_path / "out", BLOCKS)
    found = values(tmp_path / "out")[name]
    assert [found[0, 0], found[0, 128], found[128, 0], found[128, 128]] == [2.0**-127, 2.0**-126, 0.5, 2.0**126]


def test_scales_that_no_output_holds_exactly_are_refused_before_the_work(tmp_path: Path) -> None:
    source = model(tmp_path / "source", np.float64, 192)
    with pytest.raises(CheckpointError, match=r"scale_inv in .* has type F64"):
        carried(source, tmp_path / "out", BLOCKS)
    assert not (tmp_path / "out").exists()


def test_the_command_converts_and_proves_it(tmp_path: Path) -> None:
    source = model(tmp_path / "source", E8M0, 192)
    assert main(["convert", str(source), str(tmp_path / "out"), "--dialect", "halfbyte", "--verify"]) == 0
