"""Write a checkpoint with the names and shapes of a real one and random weights, for tests of size and speed.

    python scripts/make_synthetic_checkpoint.py inventory.json OUT [--layers N] [--seed S] [--shard-bytes B]

The inventory holds {"config", "tensors": {name: [dtype, shape]}}. Values follow a Student t distribution, whose heavy
tails resemble those of trained weights, and every row has a scale of its own; norms are close to 1. They are cut from
one table at random places, which is several times faster than drawing them. The same seed gives the same bytes,
whatever is left out by ``--layers``. Memory stays at one chunk, so checkpoints may be larger than it.
"""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import Inventory, ShardWriter, TensorInfo, build_header, numpy_dtype, write_file_atomic

CHUNK = 1 << 22  # elements
LAYER = re.compile(r"\blayers\.(\d+)\.")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("inventory", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="only so many layers of the main model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000)
    args = parser.parse_args()
    print(
        f"{write(args.inventory, args.out, args.layers, args.seed, args.shard_bytes):,} bytes of weights in {args.out}"
    )


def write(inventory: Path, out: Path, layers: int | None = None, seed: int = 0, shard_bytes: int = 5 * 10**9) -> int:
    """Write the checkpoint to the folder ``out``; returns the bytes of its tensors."""
    found = Inventory.from_json(inventory)
    tensors = [t for t in found.tensors.values() if layers is None or _layer(t.name) < layers]
    files: list[list[TensorInfo]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(t.nbytes for t in files[-1]) + tensor.nbytes > shard_bytes:
            files.append([])
        files[-1].append(tensor)
    out.mkdir(parents=True)
    weight_map = {}
    for i, members in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        layout = build_header([(t.name, t.dtype, t.shape) for t in members])
        with ShardWriter(out / name, layout) as writer:
            for tensor, offset in zip(members, layout.offsets, strict=True):
                for start, values in _values(tensor, seed):
                    writer.write_at(offset + start, values)
            writer.commit()
        weight_map |= {t.name: name for t in members}
    total = sum(t.nbytes for t in tensors)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file_atomic(out / "model.safetensors.index.json", json.dumps(index).encode())
    write_file_atomic(out / "config.json", json.dumps(_config(found.config, layers), indent=2).encode())
    return total


def _layer(name: str) -> int:
    match = LAYER.search(name)
    return int(match.group(1)) if match and not name.startswith("mtp.") else -1


def _config(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    if layers is None:
        return config
    changed = dict(config)
    for part in (changed, text := dict(config.get("text_config") or {})):
        part |= {"num_hidden_layers": layers} if "num_hidden_layers" in part else {}
        part |= {"layer_types": part["layer_types"][:layers]} if "layer_types" in part else {}
    return {**changed, "text_config": text} if text else changed


def _values(tensor: TensorInfo, seed: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """(byte offset, values) of a tensor, chunk by chunk; integers and packed types are random bytes."""
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    dtype = numpy_dtype(tensor.dtype)
    count = tensor.nbytes // dtype.itemsize
    if tensor.dtype not in ("BF16", "F16", "F32", "F64"):
        for first in range(0, tensor.nbytes, CHUNK):
            yield first, rng.integers(0, 128, min(CHUNK, tensor.nbytes - first), dtype=np.uint8)
        return
    if "norm" in tensor.name:
        yield 0, (1 + 0.1 * rng.standard_normal(count, dtype=np.float32)).astype(dtype)
        return
    width = tensor.shape[-1] if len(tensor.shape) > 1 else count
    table = _student_t(seed)
    # whole rows at a time; a row that is longer than a chunk has as many scales as it has chunks
    width = min(max(width, 1), CHUNK)
    step = CHUNK // width * width
    for first in range(0, count, step):
        part = min(step, count - first)
        start = int(rng.integers(0, table.size - part + 1))
        values = table[start : start + part].copy()
        rows = values[: part // width * width].reshape(-1, width)
        rows *= np.exp(0.3 * rng.standard_normal((len(rows), 1), dtype=np.float32))
        yield first * dtype.itemsize, values.astype(dtype)


@cache
def _student_t(seed: int) -> NDArray[np.float32]:
    """Two chunks of Student t with 5 degrees of freedom: a normal over the root of a mean of 5 squares."""
    rng = np.random.default_rng(seed)
    squares = rng.standard_gamma(2.5, 2 * CHUNK, dtype=np.float32) / np.float32(2.5)
    return rng.standard_normal(2 * CHUNK, dtype=np.float32) / np.sqrt(squares) * np.float32(0.02)


if __name__ == "__main__":
    main()
