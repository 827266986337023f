"""The results document: what was measured on which machine, and what each checkpoint consists of."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte.checkpoint.files import parse_object, read_small
from halfbyte.errors import CheckpointError
from halfbyte.plan.conversion_plan import PROVENANCE
from halfbyte.source.checkpoint import Checkpoint

VERSION = 1
PACKAGES = ("numpy", "torch", "transformers", "lm_eval")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def command() -> str:
    """The command line of this process."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def environment(device: Any = None, packages: tuple[str, ...] = PACKAGES[:3]) -> dict[str, Any]:
    """Describe the machine, the device and the versions of packages."""
    kind = str(device or "cpu")
    if kind.startswith("cuda"):
        import torch

        kind = torch.cuda.get_device_name(device)
    versions = {"halfbyte": halfbyte.__version__, "python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"machine": _cpu(), "cores": os.cpu_count(), "device": kind, "versions": versions}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"model name\s*: (.+)", info.read_text(errors="replace"))):
        return match.group(1)
    return platform.processor() or platform.machine()


def describe(path: str | Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The part of a row that is known without running the model, but for the fingerprint."""
    inventory = checkpoint.inventory
    size = inventory.total_bytes
    parameters = sum(math.prod(weight.shape) for weight in checkpoint.weights)
    made = provenance_of(inventory.root)
    roles = {weight.role for weight in checkpoint.weights}
    side = 0 if inventory.root is None else _size(inventory.root / "config.json")
    return {
        "name": name_of(path),
        "path": str(path),
        "revision": inventory.revision,
        "recipe": _recipe(made),
        "dialect": checkpoint.dialect.name if checkpoint.dialect else None,
        "source": made.get("source"),
        "bytes": size,
        "repository_bytes": sum(inventory.files.values()) + inventory.side_file_bytes + side,
        "parameters": parameters,
        "bits_per_weight": 8 * size / max(parameters, 1),
        "contains": contents(checkpoint),
        "vision": any(role.startswith("vision") for role in roles),
        "mtp": any(role.startswith("mtp") for role in roles),
    }


def contents(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Parameters, bytes and roles by format or dtype, the largest first."""
    tensors = checkpoint.inventory.tensors
    entries: dict[str, dict[str, Any]] = {}
    for weight in checkpoint.weights:
        fmt = checkpoint.formats.get(weight.name)
        key = fmt.name if fmt else weight.dtype
        entry = entries.setdefault(
            key, {"storage": key, "quantized": fmt is not None, "roles": [], "parameters": 0, "bytes": 0}
        )
        names = [output.name for output in checkpoint.stored(weight)] if fmt else list(weight.sources)
        entry["parameters"] += math.prod(weight.shape)
        entry["bytes"] += sum(tensors[name].nbytes for name in names)
        if weight.role not in entry["roles"]:
            entry["roles"].append(weight.role)
    return sorted(entries.values(), key=lambda entry: -entry["bytes"])


def name_of(path: str | Path) -> str:
    """A folder's own name, or a hub id."""
    return Path(path).resolve().name if Path(path).exists() else str(path)


def distinct_names(paths: list[str | Path]) -> list[str]:
    """Names of rows; where two folders have the same, the paths (reports and cards leave their folders out)."""
    names = [name_of(path) for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def provenance_of(root: Path | None) -> dict[str, Any]:
    """Return halfbyte.json, {} where there is none that can be read."""
    try:
        return {} if root is None else parse_object(read_small(root / PROVENANCE), PROVENANCE)
    except CheckpointError:
        return {}


def _recipe(made: dict[str, Any]) -> str | None:
    """The recipe's name, and how much of its rounding could be done."""
    recipe, part = made.get("recipe"), made.get("rounded_with_hessian")
    name = recipe.get("name") if isinstance(recipe, dict) else None
    if not isinstance(name, str):
        return None
    if isinstance(part, dict):
        return f"{name} ({part.get('weights')} of {part.get('of')} weights rounded with Hessians)"
    return name


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
