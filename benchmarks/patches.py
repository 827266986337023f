"""How large patches of fine-tunes are: rank-8 changes of a real model's matrices, quantized, as a share of the file.

    python benchmarks/patches.py SOURCE [--recipe nvfp4] [--json FILE]

The change of each matrix of the layers is a random product of rank 8, its norm a share of the matrix's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

import halfbyte
from halfbyte.checkpoint import Inventory, Reader, ShardWriter, build_header
from halfbyte.patch.apply_patch import apply_patch
from halfbyte.patch.make_patch import make_patch

SHARES = (0.001, 0.003, 0.01, 0.03)
RANK = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--recipe", default="nvfp4")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        halfbyte.quantize(args.source, base, args.recipe, dialect="compressed-tensors")
        for share in SHARES:
            tuned, quantized = Path(folder) / "tuned", Path(folder) / "tuned4"
            tune(args.source, tuned, share)
            halfbyte.quantize(tuned, quantized, args.recipe, dialect="compressed-tensors")
            made = make_patch(base, quantized, Path(folder) / "patch.safetensors")
            apply_patch(base, made.path, Path(folder) / "out")
            rows.append({"change": share, "patch_bytes": made.nbytes, "target_bytes": made.target_bytes})
            for path in (tuned, quantized, Path(folder) / "out"):
                shutil.rmtree(path)
    print(f"{args.source.name}, {args.recipe}, rank {RANK}")
    for row in rows:
        part = row["patch_bytes"] / row["target_bytes"]
        print(f"change {row['change']:.1%}   patch {row['patch_bytes']:>12,} bytes   {part:.1%} of the checkpoint")
    if args.json:
        args.json.write_text(json.dumps({"source": args.source.name, "recipe": args.recipe, "rows": rows}, indent=2))


def tune(source: Path, out: Path, share: float) -> None:
    """Copy a checkpoint with every matrix of its layers changed."""
    shutil.copytree(source, out)
    inventory = Inventory.open(source)
    rng = np.random.default_rng(0)
    for file in inventory.files:
        infos = [info for info in inventory.tensors.values() if info.file == file]
        layout = build_header([(i.name, i.dtype, i.shape) for i in infos])
        (out / file).unlink()
        with Reader(inventory) as reader, ShardWriter(out / file, layout) as writer:
            for info, offset in zip(infos, layout.offsets, strict=True):
                array = reader.read(info.name)
                if array.ndim > 1 and ".layers." in info.name and "conv" not in info.name:
                    array = _changed(array, share, rng)
                writer.write_at(offset, array)
            writer.commit()


def _changed(array: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    wide = array.astype(np.float32)
    delta = rng.normal(size=(*wide.shape[:-1], RANK)) @ rng.normal(size=(*wide.shape[:-2], RANK, wide.shape[-1]))
    scale = share * np.linalg.norm(wide) / np.linalg.norm(delta)
    return (wide + scale * delta.astype(np.float32)).astype(array.dtype)


if __name__ == "__main__":
    main()
