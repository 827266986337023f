"""What is fuzzed: for every kind of file a corpus, and the function that reads a mutated case.

A target may raise HalfbyteError and nothing else. ``kernels`` gets arrays instead of files.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fuzz import corpus
from fuzz.mutate import mutate, mutate_json
from halfbyte.calibration import read_importance
from halfbyte.checkpoint import Inventory, Reader
from halfbyte.checkpoint.gguf_parser import parse_gguf
from halfbyte.checkpoint.journal import Journal, read_recipe
from halfbyte.evaluate.conversations import read_conversations
from halfbyte.formats import get_format
from halfbyte.recipes import parse_recipe
from halfbyte.report.read import read_document
from halfbyte.search import encode
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.overview import overview
from halfbyte.verify.weights import verify


@dataclass
class Target:
    """``make`` gives a case from a random generator; ``check`` reads it; ``share`` of the time goes to it."""

    name: str
    make: Callable[[random.Random], bytes]
    check: Callable[[bytes], None]
    share: float = 1.0


def targets(folder: Path) -> list[Target]:
    """All targets, with their files in ``folder``, which must be empty."""
    source = corpus.model(folder / "source")
    outputs = corpus.outputs(folder / "outputs", source)
    own, dat, gguf = corpus.importance_files(folder / "importance")
    shards = corpus.plain_file(), corpus.INDEX
    (folder / "index").mkdir()
    (folder / "index" / "m.safetensors").write_bytes(shards[0])
    return [
        _mutated("safetensors header", [shards[0]], _file(folder / "header" / "model.safetensors", _inventory)),
        _mutated("index", [shards[1]], _file(folder / "index" / "model.safetensors.index.json", _inventory), True),
        _mutated("journal", [corpus.JOURNAL], _file(folder / "journal" / ".halfbyte" / "journal.jsonl", _journal)),
        _mutated("GGUF header", [gguf.read_bytes()], _file(folder / "gguf" / "model.gguf", _gguf)),
        _mutated("imatrix.dat", [dat.read_bytes()], _file(folder / "dat" / "imatrix.dat", _importance)),
        _mutated("imatrix.gguf", [gguf.read_bytes()], _file(folder / "igguf" / "imatrix.gguf", _importance)),
        _mutated("importance.safetensors", [own.read_bytes()], _file(folder / "own" / "a.safetensors", _importance)),
        *[_config(folder, out) for out in [source, *outputs]],
        _mutated("recipe", corpus.RECIPES, _recipe),
        _mutated("conversations", corpus.CONVERSATIONS, _file(folder / "talk" / "a.jsonl", read_conversations), True),
        _mutated("results", corpus.results(), _file(folder / "results" / "a.json", read_document), True),
        _provenance(folder, outputs[0]),
        Target("kernels", _array_case, _encode),
    ]


SLOW = ("config.json", "quantization_config", "halfbyte.json", "results")
"""Targets with milliseconds per case get less of the time, so that all get many cases."""


def _mutated(name: str, files: list[bytes], check: Callable[[bytes], None], as_json: bool = False) -> Target:
    def make(rng: random.Random) -> bytes:
        change = mutate_json if as_json and rng.random() < 0.6 else mutate
        return change(rng.choice(files), rng)

    return Target(name, make, check, 0.6 if name.startswith(SLOW) else 1.0)


def _file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    path.parent.mkdir(parents=True, exist_ok=True)

    def check(case: bytes) -> None:
        path.write_bytes(case)
        read(path)

    return check


def _inventory(path: Path) -> None:
    inventory = Inventory.open(path.parent)
    with Reader(inventory) as reader:
        for name in list(inventory.tensors)[:3]:
            reader.read(name)


def _journal(path: Path) -> None:
    folder = path.parent.parent
    (folder / "model.safetensors").write_bytes(b"12345")
    read_recipe(folder)
    Journal(folder, "f").check_files()


def _gguf(path: Path) -> None:
    parse_gguf(path)
    Inventory.open(path.parent)


def _importance(path: Path) -> None:
    read_importance(path)


def _recipe(case: bytes) -> None:
    parse_recipe(case.decode(errors="surrogateescape"), "case")


def _config(folder: Path, out: Path) -> Target:
    """config.json of a plain checkpoint, or with the quantization_config of a dialect."""
    copy = folder / "config" / out.name
    shutil.copytree(out, copy)
    check = _file(copy / "config.json", lambda path: overview(Checkpoint.open(path.parent)))
    name = "config.json" if out.name == "source" else f"quantization_config, {out.name}"
    return _mutated(name, [(out / "config.json").read_bytes()], check, True)


def _provenance(folder: Path, out: Path) -> Target:
    copy = folder / "provenance"
    shutil.copytree(out, copy)
    check = _file(copy / "halfbyte.json", lambda path: verify(path.parent))
    return _mutated("halfbyte.json", [(out / "halfbyte.json").read_bytes()], check, True)


FORMATS = ["nvfp4", "mxfp4", "mixfp4", "int4_g32", "int4_asym_g32", "q4_0", "q8_0", "fp8_channel", "affine4_g32", "nf4"]
SEARCHES = ["absmax", "sweep"]


def _array_case(rng: random.Random) -> bytes:
    """Format, search, rows, and FP32 values: random bits, among them NaNs, infinities and denormals, or few values."""
    rows, columns = rng.randint(1, 4), 32 * rng.randint(1, 3)
    head = bytes([rng.randrange(len(FORMATS)), rng.randrange(len(SEARCHES)), rows])
    bits = rng.randbytes(4 * rows * columns)
    if rng.random() < 0.7:  # finite, of one exponent or of many
        words = np.frombuffer(bits, np.uint32) & np.uint32(0x807FFFFF)
        exponents = rng.choices(range(255), k=rng.choice((1, words.size)))
        words |= np.resize(np.array(exponents, np.uint32), words.size) << np.uint32(23)
        bits = words.tobytes()
    return head + bits


def _encode(case: bytes) -> None:
    fmt = get_format(FORMATS[case[0]])
    values = np.frombuffer(case[3:], np.float32).reshape(case[2], -1)
    tensor = encode(values, fmt, SEARCHES[case[1]])
    decoded = tensor.decode()
    if fmt.is_finite(tensor) and not np.isfinite(decoded).all() and np.abs(values).max() < 1e37:
        raise AssertionError(f"{fmt.name} decodes finite values to others")
