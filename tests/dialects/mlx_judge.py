"""MLX as a judge: its decoding of our arrays, its models' logits, and checkpoints that it makes itself.

Import this after ``pytest.importorskip("mlx")``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from numpy.typing import NDArray

from halfbyte.checkpoint import Reader
from halfbyte.dialects.mlx_names import config_for_mlx
from halfbyte.dialects.mlx_source import parameters
from halfbyte.formats import Format
from halfbyte.source.checkpoint import Checkpoint

TOKENS = [int(token) for token in np.random.RandomState(0).randint(0, 200, 40)]


def to_mlx(array: NDArray[Any]) -> Any:
    """Floats as FP32, words and bytes as they are."""
    return mx.array(array if array.dtype in (np.uint8, np.uint32) else array.astype(np.float32))


def dequantize(arrays: dict[str, NDArray[Any]], fmt: Format) -> NDArray[np.float32]:
    """``mx.dequantize`` of the arrays of one module (``weight``, ``scales``, ...), in FP32."""
    told = parameters(fmt)
    scaled = told.pop("global_scale", False)
    words, scales = to_mlx(arrays["weight"]), to_mlx(arrays["scales"])
    if scaled:
        each = [
            mx.dequantize(words[e], scales[e], **told, global_scale=mx.array(factor), dtype=mx.float32)
            for e, factor in enumerate(arrays["global_scale"])
        ]
        return np.array(mx.stack(each))
    biases = to_mlx(arrays["biases"]) if "biases" in arrays else None
    return np.array(mx.dequantize(words, scales, biases, **told, dtype=mx.float32))


def count_equal(folder: Path) -> int:
    """Compare every quantized module of a checkpoint: MLX's values with ours. The number of modules."""
    checkpoint, compared = Checkpoint.open(folder), 0
    with Reader(checkpoint.inventory) as reader:
        for weight in checkpoint.weights:
            if weight.name not in checkpoint.formats:
                continue
            fmt, ours = checkpoint.formats[weight.name], checkpoint.read(reader, weight)
            modules: dict[str, dict[str, NDArray[Any]]] = {}
            rows = {}
            for output in checkpoint.stored(weight):
                module, _, part = output.name.rpartition(".")
                modules.setdefault(module, {})[part] = reader.read(output.name)
                rows[module] = output.rows or rows.get(module)
            for module, arrays in modules.items():
                mine = ours[:, slice(*rows[module])] if rows[module] else ours
                assert np.array_equal(dequantize(arrays, fmt), mine), f"{module} in {fmt.name}"
                compared += 1
    return compared


def logits(folder: Path, tokens: Sequence[int] = TOKENS) -> NDArray[np.float32]:
    """Of mlx-lm's model in FP32, [tokens, vocabulary]."""
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([list(tokens)]))[0].astype(mx.float32))


def convert_with_mlx(source: Path, out: Path, mode: str, bits: int, group: int) -> None:
    """What ``mlx_lm.convert -q`` does, for a source whose configuration is spelled for mlx-lm first."""
    spelled = out.with_name(f"{out.name}-source")
    shutil.copytree(source, spelled)
    config = config_for_mlx(json.loads((source / "config.json").read_text()))
    (spelled / "config.json").write_text(json.dumps(config))
    model, config = load_model(spelled)
    model, config = quantize_model(model, config, group, bits, mode=mode)
    out.mkdir()
    save_model(out, model)
    save_config(config, out / "config.json")
