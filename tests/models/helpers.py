"""Small inventories from a table of names, and the families' tensor lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LISTS = Path(__file__).parent / "tensor_lists"


@dataclass
class Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass
class FakeInventory:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def inventory(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], dtype: str = "BF16") -> FakeInventory:
    return FakeInventory({name: Tensor(name, dtype, shape) for name, shape in shapes.items()}, config)


def experts(count: int, prefix: str = "model.layers.0.mlp.experts.") -> dict[str, tuple[int, ...]]:
    """Names and shapes of per-expert tensors: H = 8, I = 4."""
    parts = {"gate_proj": (4, 8), "up_proj": (4, 8), "down_proj": (8, 4)}
    return {f"{prefix}{e}.{part}.weight": shape for e in range(count) for part, shape in parts.items()}
