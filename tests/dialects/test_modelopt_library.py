"""Judged by NVIDIA ModelOpt itself: its exports decode to its values, and what is written decodes to ours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.checkpoint import Reader
from halfbyte.dialects.modules import modules
from halfbyte.source.checkpoint import Checkpoint
from small_models import MOE_CONFIG, Tensors, linear, moe_tensors, read_file, run, write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("modelopt")

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "make_golden_modelopt.py"
EXPORTS = [
    ("NVFP4_DEFAULT_CFG", True),
    ("NVFP4_DEFAULT_CFG", False),
    ("W4A16_NVFP4_CFG", True),
    ("FP8_DEFAULT_CFG", True),
    ("FP8_DEFAULT_CFG", False),
    ("FP8_PER_CHANNEL_PER_TOKEN_CFG", False),
    ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", False),
    ("MXFP8_DEFAULT_CFG", False),
    ("MXFP4_DEFAULT_CFG", False),
    ("mixed", False),
]


def library_values(stored: Tensors, module: str, fmt: str) -> Any:
    """FP32 values of one stored module by modelopt's tensor classes."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

    def part(name: str) -> Any:
        array = stored[f"{module}.{name}"]
        raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
        kinds = {"uint8": torch.uint8, "float8_e4m3fn": torch.float8_e4m3fn, "float32": torch.float32}
        return raw.view(kinds[array.dtype.name]).reshape(array.shape)

    codes, scale, wide = part("weight"), part("weight_scale"), torch.float32
    n, k = codes.shape
    if fmt == "nvfp4":
        tensor, shape = NVFP4QTensor, (n, 2 * k)
        more = {"double_scale": part("weight_scale_2"), "block_sizes": {-1: 16}}
    elif fmt == "mxfp4":
        tensor, shape, more = MXFP4QTensor, (n, 2 * k), {"block_sizes": {-1: 32}}
    elif fmt == "mxfp8":
        tensor, shape, more = MXFP8QTensor, (n, k), {}
    else:
        tensor, shape, more = FP8QTensor, (n, k), {}
        if fmt == "fp8_channel":
            scale = scale[:, None]
        elif scale.ndim == 4:
            scale, more = scale[:, 0, :, 0], {"block_sizes": {-1: 128, -2: 128}}
            n = n + -n % 128
    return tensor(torch.Size(shape), wide, codes).dequantize(wide, scale=scale, **more).numpy()


def compare(folder: Path) -> int:
    """How many modules of a checkpoint the library decodes, all of them to our values."""
    checkpoint, stored, count = Checkpoint.open(folder), read_file(folder), 0
    assert checkpoint.dialect is not None and checkpoint.dialect.name == "modelopt"
    with Reader(checkpoint.inventory) as reader:
        for weight in (w for w in checkpoint.weights if w.name in checkpoint.formats):
            ours = checkpoint.read(reader, weight)
            for m in modules(weight):
                mine = ours if m.expert is None else ours[m.expert]
                mine = mine if m.rows is None else mine[slice(*m.rows)]
                assert np.array_equal(library_values(stored, m.name, checkpoint.formats[weight.name].name), mine)
                count += 1
    return count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("recipe", "experts"), EXPORTS)
def test_exports_decode_to_the_librarys_values(tmp_path: Path, recipe: str, experts: bool) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    spec = importlib.util.spec_from_file_location("make_golden_modelopt", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(script)
    tokens = torch.arange(64).reshape(2, 32)
    model = mtq.quantize(script.build(experts), script.recipe(recipe), lambda m: m(tokens))
    export_hf_checkpoint(model, export_dir=tmp_path)
    assert compare(tmp_path) == (4 + 2 * 3 if experts else 7)


@pytest.mark.parametrize("per_expert", [False, True], ids=["fused", "per expert"])
@pytest.mark.parametrize("fmt", ["nvfp4", "fp8_channel", "fp8_block128", "mxfp8"])
def test_the_library_decodes_every_written_module_to_our_values(tmp_path: Path, fmt: str, per_expert: bool) -> None:
    source = write_checkpoint(tmp_path / "source", moe_tensors(per_expert), MOE_CONFIG)
    run(source, tmp_path / "out", linear(fmt), "modelopt")
    assert compare(tmp_path / "out") > 30
