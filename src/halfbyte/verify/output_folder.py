"""What lies in an output's folder beside its weights, compared with the source: files, configuration, index, recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.files import read_small
from halfbyte.checkpoint.journal import NAME
from halfbyte.checkpoint.lock import FOLDER
from halfbyte.checkpoint.shared_journal import RUN
from halfbyte.checkpoint.stream_hash import hash_path
from halfbyte.dialects import unquantized_config
from halfbyte.dialects.modelopt_config import FILE as MODELOPT_FILE
from halfbyte.errors import HalfbyteError, VerifyError
from halfbyte.plan.conversion_plan import INDEX, PROVENANCE
from halfbyte.recipes import Decision, parse_recipe, resolve
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.smoothing import SMOOTHING_FILE

CARD_MARK = "<!-- written by halfbyte card -->"
"""In model cards that take the place of the source's."""


def unfinished(folder: Path) -> None:
    """VerifyError for the folder of a conversion that has not come to its end."""
    if (folder / FOLDER / NAME).exists():
        raise VerifyError(f"{folder} is an unfinished conversion; run the same quantize command again to complete it")
    if (folder / FOLDER / RUN).exists():
        raise VerifyError(f"{folder} is not complete; run all shards, then `halfbyte finish {folder}`")


def decisions_of(folder: Path, record: dict[str, Any], source: Checkpoint) -> dict[str, Decision]:
    """What the recipe in halfbyte.json wants of each weight; nothing where there is no such file."""
    if not record:
        return {}
    try:
        recipe = parse_recipe(json.dumps(record["recipe"]), "its recipe")
        decisions = resolve(recipe, source.weights)
    except (ValueError, KeyError, TypeError, HalfbyteError) as error:
        where = folder / PROVENANCE
        raise VerifyError(f"{where} cannot be used with this source ({error}); is it the right source?") from error
    return {w.name: d for w, d in zip(source.weights, decisions, strict=True)}


def files_beside(folder: Path, output: Checkpoint, checkpoint: Checkpoint) -> list[str]:
    """What is wrong with everything but the weights: side files, config.json, index."""
    ours, source = output.inventory, checkpoint.inventory
    if output.dialect and output.dialect.package.standalone:
        return output.dialect.package.differences(source)
    replaced = {
        PROVENANCE,
        SMOOTHING_FILE,
        MODELOPT_FILE,
        *(checkpoint.dialect.package.files if checkpoint.dialect else ()),
    }
    problems = []
    for name, size in source.side_files.items():
        if name in replaced or ours.root is None:
            continue
        path = ours.root / name
        if not path.is_file():
            problems.append(f"the side file {name} of the source is missing")
        elif name == "README.md" and CARD_MARK.encode() in read_small(path):
            continue
        elif path.stat().st_size != size or hash_path(path) != source.store.sha256(name):
            problems.append(f"the side file {name} differs from the source")
    stray = [name for name in ours.ignored_files if name.endswith(".safetensors")]
    if stray:
        problems.append(f"{stray[0]} is a weight file that the index does not name; an engine may load it instead")
    if not ours.config:
        problems.append("config.json is missing")
    left, right = (_comparable(config, output, checkpoint) for config in (ours.config, source.config))
    for key in sorted({*left, *right}):
        if ours.config and left.get(key) != right.get(key):
            problems.append(f"config.json differs from the source in {key}")
    stated = ours.meta.get("total_size")
    if (folder / INDEX).exists() and stated != ours.total_bytes:
        problems.append(f"the index states {stated} bytes of tensors, but there are {ours.total_bytes}")
    return problems


def _comparable(config: dict[str, Any], *spelled: Checkpoint) -> dict[str, Any]:
    """What a conversion leaves as it is: all but the quantization, a dialect's names and our own remote code."""
    for checkpoint in spelled:
        config = checkpoint.dialect.package.original_config(config) if checkpoint.dialect else config
    code = config.get("auto_map") or {}
    is_ours = all(str(value).startswith("halfbyte_quantizer.") for value in code.values())
    return {k: v for k, v in unquantized_config(config).items() if not (k == "auto_map" and is_ours)}
