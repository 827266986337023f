"""Which model statistics of activations were collected from, and whether it is the one that they are used for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from halfbyte.errors import PlanError
from halfbyte.source.checkpoint import Checkpoint

TENSORS, BYTES = 256, 4096
"""How many tensors are looked into, spread evenly over their names, and how many bytes of each."""
_NOTES = ("transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures", "quantization_config")


def identity_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Return hashes (sha256) of the ``config``, of all ``tensors`` (names, types, shapes) and of sampled ``content``.

    How tensors are spread over files does not matter. Without weights (an inventory) there is no ``content``.
    """
    inventory = checkpoint.inventory
    config = {key: value for key, value in inventory.config.items() if key not in _NOTES}
    names = sorted(inventory.tensors)
    shapes = [(name, inventory.tensors[name].dtype, inventory.tensors[name].shape) for name in names]
    identity = {"config": _hash(config), "tensors": _hash(shapes)}
    if inventory.root is not None or inventory.remote is not None:
        content = hashlib.sha256()
        step = max(1, len(names) // TENSORS)
        for name in names[::step]:
            info = inventory.tensors[name]
            part = memoryview(bytearray(min(BYTES, info.nbytes)))
            # the middle: what is at the beginning is often padding or a scale that many models share
            middle = info.offset + max(0, info.nbytes - BYTES) // 2
            content.update(part[: inventory.store.read_into(info.file, part, middle)])
        identity["content"] = content.hexdigest()
    return identity


def check_identity(statistics: Mapping[str, Any], checkpoint: Checkpoint, of_base: bool = False) -> list[str]:
    """Notes about statistics (``statistics``) of another model; PlanError where they are not said to be ``of_base``."""
    source = statistics.get("source") or {}
    name, before = source.get("name", "a model that is not named"), source.get("identity")
    if not isinstance(before, dict):
        return [
            f"the statistics, of {name}, do not say which weights they were collected from; calibrate again to have "
            "that checked"
        ]
    now = identity_of(checkpoint)
    differing = [key for key in ("config", "tensors", "content") if key in now and before.get(key) != now[key]]
    if not differing:
        return []
    what = {"config": "its configuration", "tensors": "names or shapes of its tensors", "content": "its weights"}
    differences = " and ".join(what[key] for key in differing)
    if of_base:
        return [f"the statistics are those of {name}, of which {differences} differ, as of a base model"]
    raise PlanError(
        f"the statistics were collected from {name}, which is another model than {checkpoint.inventory.source}: "
        f"{differences} differ; calibrate this one, or say that they are of its base model (--calibration-of-base)"
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
