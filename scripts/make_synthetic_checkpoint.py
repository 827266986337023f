"""Write a checkpoint with the names and shapes of a real one and random weights, for tests of size and speed.

    python scripts/make_synthetic_checkpoint.py inventory.json OUT [--layers N] [--seed S] [--shard-bytes B]

The inventory holds {"config", "tensors": {name: [dtype, shape]}}. Values follow a Student t distribution, whose heavy
tails resemble those of trained weights; norms are close to 1. The same seed gives the same bytes, whatever is left
out by ``--layers``. Memory stays at one chunk, so checkpoints may be larger than it.
"""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections.abc import Iterator
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
    changed = {**config, "num_hidden_layers": layers} if "num_hidden_layers" in config else dict(config)
    if "text_config" in changed:
        changed["text_config"] = {**changed["text_config"], "num_hidden_layers": layers}
    return changed


def _values(tensor: TensorInfo, seed: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """(byte offset, values) of a tensor, chunk by chunk; integers and packed types are random bytes."""
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    dtype = numpy_dtype(tensor.dtype)
    floating = tensor.dtype in ("BF16", "F16", "F32", "F64")
    for first in range(0, tensor.nbytes // dtype.itemsize, CHUNK):
        count = min(CHUNK, tensor.nbytes // dtype.itemsize - first)
        if not floating:
            yield first * dtype.itemsize, rng.integers(0, 128, count * dtype.itemsize, dtype=np.uint8)
        elif "norm" in tensor.name:
            yield first * dtype.itemsize, (1 + 0.1 * rng.standard_normal(count, dtype=np.float32)).astype(dtype)
        else:
            # Student t with 5 degrees of freedom, as a normal over the root of a mean of 5 squares
            squares = rng.standard_gamma(2.5, count, dtype=np.float32) / np.float32(2.5)
            values = rng.standard_normal(count, dtype=np.float32) / np.sqrt(squares) * np.float32(0.02)
            yield first * dtype.itemsize, values.astype(dtype)


if __name__ == "__main__":
    main()
