"""Inputs made by formula, the same bits everywhere: for anchors, golden files and the script that makes those.

Needs NumPy only, since the script runs in environments of other packages.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def frozen() -> Floats:
    """1024 blocks of 16 from an integer formula, exact in FP32; shape [128, 128]."""
    i = np.arange(16384)
    x = (((7 * i * i + 31 * i + 5) % 8191) - 4095) / 4096 * 2.0 ** -((i // 16) % 5)
    return x.astype(np.float32).reshape(128, 128)


def gaussian() -> Floats:
    """The frozen Gaussian stream, shape [1024, 512]."""
    return np.random.RandomState(0).standard_normal((1024, 512)).astype(np.float32)


def laplace() -> Floats:
    """The frozen Laplace stream, shape [1024, 512]."""
    return np.random.RandomState(0).laplace(size=(1024, 512)).astype(np.float32)


def student() -> Floats:
    """Heavy tails: Student's t with two degrees of freedom, shape [1024, 512]."""
    return np.random.RandomState(2).standard_t(2, size=(1024, 512)).astype(np.float32)


def gaussian_bf16() -> Floats:
    """A Gaussian stream of BF16 values (many exact ties), shape [1024, 512]."""
    return to_bf16(np.random.RandomState(1).standard_normal((1024, 512)).astype(np.float32))


def edges() -> Floats:
    """Rows of 32: zeros, minus zeros, single values, all ties of E2M1, powers of two, wide ranges; [48, 32]."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], dtype=np.float32)
    rows = [np.zeros(32), -np.zeros(32), np.full(32, 1.0), np.full(32, -3.5), np.tile(ties, 4), -np.tile(ties, 4)]
    rows += [np.where(np.arange(32) == 5, value, 0.0) for value in (1.0, -6.0, 7.0, 1.75, 0.875, 448.0)]
    rows += [np.linspace(-1, 1, 32) * 2.0**e for e in range(-12, 12)]
    rows += [np.geomspace(1e-6, 1.0, 32) * sign for sign in (1, -1)]
    rows += [np.random.RandomState(e).standard_normal(32) * 10.0**e for e in range(0, 10)]
    return np.array(rows, dtype=np.float32)


STREAMS: dict[str, Callable[[], Floats]] = {
    f.__name__: f for f in (frozen, gaussian, laplace, student, gaussian_bf16, edges)
}


def golden(package: str) -> dict[str, Any]:
    """What scripts/make_golden_vectors.py recorded of an independent package."""
    path = Path(__file__).parent.parent / "golden" / f"{package}.json"
    return dict(json.loads(path.read_text())["cases"])


def random_bytes(shape: tuple[int, ...], seed: int, low: int = 0, high: int = 256) -> NDArray[np.uint8]:
    """Bytes for decoding tests."""
    return np.random.RandomState(seed).randint(low, high, size=shape).astype(np.uint8)


def to_bf16(x: Floats) -> Floats:
    """Round FP32 to the nearest BF16, ties to even, by integer arithmetic."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def digests(array: NDArray[np.generic], parts: int = 8) -> list[str]:
    """First 16 hex digits of SHA-256 of equal slices of the bytes, so that a difference can be located."""
    raw = np.ascontiguousarray(array).view(np.uint8).reshape(parts, -1)
    return [hashlib.sha256(part.tobytes()).hexdigest()[:16] for part in raw]


def fingerprints(codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> bytes:
    """One byte of CRC32 per block (packed codes, then the scale byte), to count equal blocks."""
    blocks = codes.reshape(scales.size, -1)
    return bytes(zlib.crc32(c.tobytes() + bytes([s])) & 255 for c, s in zip(blocks, scales.ravel(), strict=True))
