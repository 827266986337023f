"""Quantized checkpoints with the faults that known bugs of tools left in real ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tests.small_models import Tensors, read_file, write_file

from halfbyte.audit.run_audit import Audit, audit


def rewritten(
    good: Path, out: Path, change: Callable[[Tensors], None], config: Callable[[Any], None] | None = None
) -> Path:
    """A copy of a checkpoint in one file, with its tensors and its configuration changed."""
    shutil.copytree(good, out)
    tensors = read_file(out)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    change(tensors)
    write_file(out / "model.safetensors", tensors)
    if config is not None:
        path = out / "config.json"
        content = json.loads(path.read_text())
        config(content)
        path.write_text(json.dumps(content))
    return out


def codes_of(result: Audit) -> set[str]:
    """The codes of the findings that are problems."""
    return {finding.code for finding in result.problems}


def audited(good: Path, out: Path, change: Callable[[Tensors], None], **more: Any) -> Audit:
    """The audit of a changed copy without its source."""
    return audit(rewritten(good, out, change, more.get("config")), more.get("against"))


def nothing(_: Any) -> None:
    """Change nothing."""


def without(*parts: str) -> Callable[[Tensors], None]:
    """Drop all tensors whose name contains one of these."""

    def drop(tensors: Tensors) -> None:
        for name in [n for n in tensors if any(part in n for part in parts)]:
            del tensors[name]

    return drop


def scaled(ending: str, factor: float, part: str = "") -> Callable[[Tensors], None]:
    """Multiply the tensors with a name that ends so."""

    def scale(tensors: Tensors) -> None:
        names = [n for n in tensors if n.endswith(ending) and part in n]
        assert names
        for name in names:
            tensors[name] = (tensors[name].astype(np.float32) * np.float32(factor)).astype(tensors[name].dtype)

    return scale


def e4m3(values: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Values as E4M3."""
    return np.asarray(values, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn)


def beside_index(good: Path, out: Path) -> Path:
    """A copy whose MTP layers lie in a second file, which an index names beside a bare model.safetensors."""
    rewritten(good, out, nothing)
    tensors = read_file(out)
    mtp = {n: t for n, t in tensors.items() if n.startswith("mtp.")}
    rest = {n: t for n, t in tensors.items() if n not in mtp}
    write_file(out / "model.safetensors", rest)
    write_file(out / "model_mtp.safetensors", mtp)
    places = dict.fromkeys(rest, "model.safetensors") | dict.fromkeys(mtp, "model_mtp.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return out
