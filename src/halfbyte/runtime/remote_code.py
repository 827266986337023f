"""The files that let a checkpoint load with ``trust_remote_code=True`` where halfbyte is not installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from halfbyte.errors import PlanError

FILES = ("halfbyte_rotation.py", "halfbyte_modules.py", "halfbyte_quantizer.py")
ENTRY = {"AutoConfig": "halfbyte_quantizer.HalfbyteConfig"}


def remote_code_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Files to put beside the weights, by name. ``config`` is the source's config.json.

    PlanError if the source has remote code of its own, which would have to be merged by hand.
    """
    foreign = {key: value for key, value in (config.get("auto_map") or {}).items() if ENTRY.get(key) != value}
    if foreign:
        raise PlanError(
            f"the source has remote code of its own ({', '.join(sorted(foreign))} in auto_map); "
            "quantize without --remote-code and load with halfbyte.load"
        )
    folder = resources.files("halfbyte.runtime.remote")
    return {name: folder.joinpath(name).read_bytes() for name in FILES}


def remote_code_config() -> dict[str, Any]:
    """What has to be in config.json for transformers to run those files."""
    return {"auto_map": dict(ENTRY)}
