"""Single flipped bits in finished outputs: how many does ``halfbyte verify OUT`` find, without the source?

``python -m fuzz.bit_flips --flips 2360 --seed 0``; exit code 1 where one is not found. Places are drawn file by file
and tensor by tensor, so that scales of four bytes and configuration files are hit as often as codes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import halfbyte
from fuzz import corpus
from halfbyte.errors import HalfbyteError
from halfbyte.recipes import Recipe, load_recipe

Place = tuple[Path, int, int]
"""A file, and the first and last byte (exclusive) of a part of it."""
OUTPUTS = [
    ("nvfp4", "halfbyte"),
    ("nvfp4", "compressed-tensors"),
    ("nvfp4", "modelopt"),
    ("mixfp4", "halfbyte"),
    ("int4_g32", "compressed-tensors"),
    ("affine4_g32", "mlx"),
    ("mxfp4", "halfbyte"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Flip bits in every output and count what is found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.bit_flips", description=__doc__)
    parser.add_argument("--flips", type=int, default=2360)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng, lost = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory(prefix="halfbyte-flips-") as base:
        source = corpus.model(Path(base) / "source")
        for number, (fmt, dialect) in enumerate(OUTPUTS):
            out = Path(base) / f"{fmt}-{dialect}"
            halfbyte.quantize(str(source), out, _recipe(fmt), dialect=dialect)
            if halfbyte.verify(out).problems:
                raise SystemExit(f"{out.name} has problems before a bit is flipped")
            count = args.flips // len(OUTPUTS) + (number < args.flips % len(OUTPUTS))
            missed = [where for _ in range(count) if not _found(where := rng.choice(_places(out)), out, rng)]
            lost += len(missed)
            print(
                f"{out.name:28} {count - len(missed)} of {count} flips found", *sorted({p.name for p, _, _ in missed})
            )
    print(f"{args.flips - lost} of {args.flips} flips found, seed {args.seed}")
    return 1 if lost else 0


def _recipe(fmt: str) -> Recipe:
    if fmt in halfbyte.list_recipes():
        return load_recipe(fmt)
    return Recipe.model_validate({"name": fmt, "rules": [{"match": "linear", "format": fmt}]})


def _places(out: Path) -> list[Place]:
    """Every small file, every header, and every tensor."""
    places: list[Place] = []
    for path in sorted(out.iterdir()):
        data = path.read_bytes()
        if path.suffix != ".safetensors":
            places.append((path, 0, len(data)))
            continue
        begin = 8 + int.from_bytes(data[:8], "little")
        places.append((path, 0, begin))
        for name, entry in json.loads(data[8:begin]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                places.append((path, begin + first, begin + last))
    return places


def _found(place: Place, out: Path, rng: random.Random) -> bool:
    """Flip one bit there, verify, and flip it back."""
    path, first, last = place
    before = path.read_bytes()
    changed = bytearray(before)
    changed[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    try:
        return bool(halfbyte.verify(out).problems)
    except HalfbyteError:
        return True
    finally:
        path.write_bytes(before)


if __name__ == "__main__":
    sys.exit(main())
