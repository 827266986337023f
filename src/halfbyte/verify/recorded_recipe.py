"""An output without checksums against what its own recorded recipe gives: every byte made again and compared."""

from __future__ import annotations

import json
import sys
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import Reader
from halfbyte.checkpoint.files import parse_json, read_small
from halfbyte.checkpoint.writer import bytes_of
from halfbyte.convert.encode_slice import Context
from halfbyte.convert.work_unit import WorkUnit
from halfbyte.dialects import quantization_config_of
from halfbyte.errors import HalfbyteError
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.resources import Limits
from halfbyte.plan.shards import Shard
from halfbyte.recipes import parse_recipe
from halfbyte.source.checkpoint import Checkpoint

SAME_BYTES = 2
"""The oldest version of halfbyte.json whose recipes give the bytes of today."""


def recorded_plan(record: Mapping[str, Any], source: Checkpoint) -> Plan | None:
    """The plan that an output's halfbyte.json tells of; None where it cannot be made again.

    That is where a calibration was used, which is not at hand, and for outputs of releases that rounded otherwise.
    """
    if record.get("halfbyte") != SAME_BYTES or record.get("importance"):
        return None
    try:
        recipe = parse_recipe(json.dumps(record["recipe"]), "its recipe")
        return make_plan(source, recipe, str(record["dialect"]), sys.maxsize)
    except (KeyError, ValueError, TypeError, HalfbyteError):
        return None


def differences(plan: Plan, folder: Path, output: Checkpoint, left: Reader, right: Reader) -> list[str]:
    """What of an output is not what the plan gives: configuration, tensors. One sentence each."""
    problems = _differing_files(plan, folder, output)
    for shard in plan.shards:
        comparison = _Comparison(shard, left)
        context = Context(plan, right, {}, lambda _: None, Limits(1))
        for unit in shard.units:
            if any(item.format is not None for item in unit):
                WorkUnit(context, unit, comparison).run()
        problems += [f"{name} is not what the recorded recipe gives" for name in comparison.differing]
    return problems


def _differing_files(plan: Plan, folder: Path, output: Checkpoint) -> list[str]:
    problems = []
    if plan.config is not None:
        wanted = json.loads(plan.config).get("quantization_config")
        if quantization_config_of(output.inventory) != wanted:
            problems.append("the quantization_config of config.json is not what the recorded recipe gives")
    for name, content in plan.extra_files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif parse_json(read_small(path), name) != json.loads(content):
            problems.append(f"{name} is not what the recorded recipe gives")
    return problems


class _Comparison:
    """Takes the bytes of a planned file and compares them with the tensors of the output, wherever these lie."""

    def __init__(self, shard: Shard, reader: Reader) -> None:
        places = sorted((at, o) for item in shard.items for at, o in zip(item.offsets, item.outputs, strict=True))
        self._starts = [at for at, _ in places]
        self._names = [output.name for _, output in places]
        self._reader = reader
        self.differing: dict[str, None] = {}

    def write_at(self, offset: int, buffer: Any) -> None:
        """Compare bytes that a conversion would write at an offset."""
        data = bytes_of(buffer)
        place = bisect_right(self._starts, offset) - 1
        name = self._names[place]
        if name in self._reader.inventory.tensors:  # else it is missing, which is a problem of its own
            stored = self._reader.chunk(name, offset - self._starts[place], len(data))
            if stored != data:
                self.differing[name] = None
