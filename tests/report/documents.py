"""Results documents: real ones from the benchmarks, and small ones whose every number a test knows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY / "benchmarks/results/models"
NASTY = "</script><img src=x onerror=alert(1)> \"'&{{7*7}}"
"""A checkpoint's name that must stay text."""


def real(name: str = "qwen3-tiny-wiki") -> dict[str, Any]:
    return json.loads((REAL / f"{name}.json").read_text(encoding="utf-8"))


def protocol(sha: str = "a" * 64) -> dict[str, Any]:
    numbers = {"length": 256, "stride": 256, "windows": 16, "tokens": 4080}
    words = {"text": "t.txt", "sha256": sha, "dtype": "float32", "kind": "text", "note": "t.txt: 4,080 tokens"}
    return {**numbers, **words, "preset": None, "skipped": {}}


def divergence(mean: float) -> dict[str, float]:
    return {"mean": mean, "median": mean / 2, "p90": 2 * mean, "p99": 5 * mean, "top1": 0.95}


def row(name: str, size: int, mean: float | None, **more: Any) -> dict[str, Any]:
    """A checkpoint; without a divergence it is the source."""
    kl = divergence(mean if mean is not None else 0.0)
    contents = {"storage": "nvfp4" if mean else "BF16", "quantized": bool(mean), "roles": ["mlp.up"]}
    return {
        "name": name,
        "path": name,
        "fingerprint": (name.encode().hex() + "0" * 64)[:64],
        "recipe": name if mean else None,
        "dialect": "halfbyte" if mean else None,
        "source": {"name": "base", "revision": None, "fingerprint": "f" * 64} if mean else None,
        "bytes": size,
        "parameters": size,
        "bits_per_weight": 8.0,
        "contains": [{**contents, "parameters": size, "bytes": size}],
        "vision": False,
        "mtp": False,
        "dtype": "float32",
        "activations": None,
        "protocol": protocol(),
        "perplexity": 20.0,
        "perplexity_ci": [19.0, 21.0],
        "perplexity_ratio": {"value": 1.01, "ci": [1.005, 1.02]} if mean else None,
        "kl_protocol": protocol(),
        "kl": kl,
        "kl_ci": {key: [0.9 * value, 1.1 * value] for key, value in kl.items()},
        "indistinguishable": {"kl": [], "perplexity": [], "noise": False if mean else None},
        "tasks": {},
        "errors": None,
        **more,
    }


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    """A results document; without rows, a source and three checkpoints."""
    some = [row("base", 16_000, None), row("small", 4_000, 0.02), row("middle", 6_000, 0.03), row("large", 8_000, 0.01)]
    return {
        "halfbyte": "results",
        "version": 1,
        "created": "2026-11-23T00:00:00+00:00",
        "command": "halfbyte evaluate small middle large --against base --text t.txt",
        "environment": {"machine": "a CPU", "cores": 2, "device": "cpu", "versions": {"halfbyte": "0.1.0"}},
        "source": "base",
        "rows": list(rows or some),
        "noise_floor": None,
        "comparisons": [],
    }


def task(value: float, sha: str = "b" * 64) -> dict[str, Any]:
    words = {"metric": "acc", "protocol": "without reasoning", "questions_sha256": sha}
    return {**words, "value": value, "ci": [value - 0.05, value + 0.05], "questions": 280, "correct": None}


def only_tasks(document: dict[str, Any], value: float = 0.5) -> dict[str, Any]:
    """The same checkpoints, of which only MMLU-Pro was measured."""
    other = copy.deepcopy(document)
    empty = dict.fromkeys(("protocol", "perplexity", "perplexity_ci", "perplexity_ratio", "kl_protocol", "kl", "kl_ci"))
    for entry in other["rows"]:
        entry |= empty | {"tasks": {"mmlu_pro": task(value)}}
    return other


def sensitivity(source: str = "base") -> dict[str, Any]:
    def group(name: str, mean: float) -> dict[str, Any]:
        about = {"group": name, "weights": [name], "roles": ["mlp.up"], "layers": [0], "format": "mxfp4"}
        sizes = {"parameters": 64, "bytes": 34, "source_bytes": 128, "relmse": 0.01, "perplexity": 20.0}
        return {**about, **sizes, "kl": divergence(mean)}

    head = {"halfbyte": "sensitivity", "version": 1, "source": source, "recipe": "mxfp4", "by": "group"}
    groups = [group("model.layers.0.mlp", 0.001), group("model.layers.1.mlp", 0.004), group("all", 0.006)]
    return {**head, "protocol": protocol(), "key": "k", "groups": groups}


def allocation(recipe: str = "mine") -> dict[str, Any]:
    points = [{"data_bytes": 4_000, "loss": 0.4}, {"data_bytes": 8_000, "loss": 0.1}]
    return {"recipe": recipe, "data_bytes": 5_000, "predicted_loss": 0.3, "units": [], "frontier": points}


def write(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path
