"""Statistics of the demo model's linear layers over invented inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from halfbyte.calibration.statistics import Part, new_description, write_description, write_part
from halfbyte.calibration.token_counts import MIN_TOKENS
from halfbyte.demo import MODEL
from halfbyte.models import Weight
from halfbyte.source.checkpoint import Checkpoint


def _inputs(rng: np.random.Generator, tokens: int, columns: int) -> np.ndarray:
    mixed = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns)) / np.sqrt(columns)
    return (mixed * np.exp(rng.standard_normal(columns))).astype(np.float32)


def part_of(weight: Weight, rng: np.random.Generator, starved: bool) -> dict[str, np.ndarray]:
    shape = weight.untransposed().shape
    each = [_inputs(rng, 3 * shape[-1], shape[-1]) for _ in range(shape[0] if len(shape) > 2 else 1)]
    if len(shape) > 2 and starved:
        each[1] = each[1][: MIN_TOKENS - 1]
    arrays = {
        "count": np.array([len(x) for x in each], np.int64),
        "squares": np.stack([np.square(x, dtype=np.float64).sum(0) for x in each]),
        "amax": np.array([np.abs(x).max() for x in each], np.float32),
        "hessian": np.stack([x.T @ x for x in each]),
    }
    return arrays if len(shape) > 2 else {kind: a[0] for kind, a in arrays.items()}


def invented_statistics(folder: Path, starved: bool = True, hessians: bool = True, pooled: bool = False) -> Path:
    """A folder of them; ``starved``: expert 1 of each stack saw too few tokens; ``pooled``: one Hessian per stack."""
    rng = np.random.default_rng(0)
    checkpoint = Checkpoint.open(MODEL)
    part = Part()
    chosen = [w for w in checkpoint.weights if not w.role.startswith("mtp.") and len(w.shape) > 1]
    for weight in (w for w in chosen if w.role.split(".")[0] in ("attention", "linear_attention", "experts", "mlp")):
        if weight.role not in ("linear_attention.conv", "linear_attention.a", "linear_attention.b"):
            part.arrays[weight.name] = part_of(weight, rng, starved)
            if pooled and len(weight.shape) > 2:
                part.arrays[weight.name]["hessian"] = part.arrays[weight.name]["hessian"].sum(0)
            if not hessians:
                del part.arrays[weight.name]["hessian"]
    folder.mkdir()
    write_part(folder, "all", part)
    about = new_description(
        source={"name": "demo", "fingerprint": ""},
        texts=["invented"],
        samples=1,
        length=1,
        tokens=1,
        hessians=hessians,
        all_experts=False,
        parts=["all"],
        complete=True,
    )
    write_description(folder, about)
    return folder
