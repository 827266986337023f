"""Repair: the checkpoint that an audit complained about, with what its source can mend; all other bytes stay.

Files of weights are copied as they are. In those that hold a weight to be encoded again, only its tensors change, in
place. What was missing goes into a new file. The new folder gets its name when everything is in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import halfbyte
from halfbyte.audit.finding import Finding
from halfbyte.audit.repair_plan import RepairPlan, plan_repair
from halfbyte.audit.run_audit import Audit, examine
from halfbyte.checkpoint import (
    Inventory,
    Layout,
    Reader,
    ShardWriter,
    TensorInfo,
    build_header,
    copy_file_atomic,
    itemsize,
    write_file_atomic,
)
from halfbyte.checkpoint.config import CONFIG
from halfbyte.checkpoint.files import parse_object, read_small, read_start, reason
from halfbyte.checkpoint.writer import bytes_of, sync_folder
from halfbyte.dialects.modelopt_config import FILE
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.formats.arrays import Array, Floats
from halfbyte.kernels import amax as largest
from halfbyte.models import Weight
from halfbyte.search import encode, get_search, global_scale
from halfbyte.source.checkpoint import Checkpoint

RECORD = "halfbyte_repair.json"
PROVENANCE = "halfbyte.json"
ADDED = "model_repaired.safetensors"
INDEX = "model.safetensors.index.json"
SEARCH = "sweep"
_CHUNK = 1 << 24


@dataclass
class Repaired:
    """The outcome. ``same``: files of weights whose bytes are those of the checkpoint, with their SHA-256; ``changed``:
    tensors that were encoded again; ``added``: tensors from the source; ``left``: problems that are not mended.
    """

    before: Audit
    after: Audit
    same: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)
    config_changed: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """The outcome as JSON values, as the new folder keeps it."""
        still = {finding.code for finding in self.after.problems}
        return {
            "schema": 1,
            "made_by": f"halfbyte {halfbyte.__version__}",
            "checkpoint": Path(self.before.checkpoint).name,
            "source": Path(self.before.against or "").name,
            "before": self.before.verdict,
            "after": self.after.verdict,
            "mended": [finding.code for finding in self.before.problems if finding.code not in still],
            "unchanged_files": self.same,
            "encoded_again": self.changed,
            "added": self.added,
            "files": self.files,
            "config_changed": self.config_changed,
            "left": [asdict(finding) for finding in self.left],
        }


def repair(
    checkpoint: str | Path,
    out: str | Path,
    against: str | Path,
    *,
    revision: str | None = None,
    other_files: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Repaired | None:
    """Write a mended copy of ``checkpoint`` to the new folder ``out``; None where there is nothing that can be mended.

    ``against``: the unquantized source. ``other_files``: take tokenizer files that differ from the source, too.
    ``progress`` gets bytes of written weight files. OutputError where ``out`` exists; CheckpointError where the source
    does not fit.
    """
    target = Path(out)
    if target.exists():
        raise OutputError(f"{target} exists already; name a new folder")
    ours, source = Checkpoint(Inventory.open(checkpoint)), Checkpoint(Inventory.open(against, revision))
    if ours.inventory.root is None or ours.inventory.ggml_types:
        raise CheckpointError(f"{checkpoint} is no folder of safetensors files, which are what can be repaired")
    before = examine(ours, source)
    plan = plan_repair(before, ours, source, other_files)
    if plan.empty:
        return None
    building = target.with_name(f"{target.name}.repairing")
    shutil.rmtree(building, ignore_errors=True)  # left by a killed run
    try:
        building.mkdir(parents=True)
        result = _write(plan, ours, source, building, progress or (lambda _: None))
        result.before, result.after = before, examine(Checkpoint(Inventory.open(building)), source)
        write_file_atomic(building / RECORD, _json(result.record))
        os.rename(building, target)
        sync_folder(target.parent)
    except OSError as error:
        raise OutputError(f"{building} cannot be written ({reason(error)})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return result


def _write(
    plan: RepairPlan, ours: Checkpoint, source: Checkpoint, out: Path, progress: Callable[[int], None]
) -> Repaired:
    root, there = ours.inventory.root, source.inventory.root
    assert root is not None and there is not None
    empty = Audit("", None, None, [])
    result = Repaired(empty, empty, left=plan.left, config_changed=plan.config is not None)
    places: dict[str, str] = {}
    with Reader(ours.inventory) as left, Reader(source.inventory) as right:
        new = _NewContents(plan.again, ours, source, right)
        for file in ours.inventory.files:
            name = plan.renamed.get(file, file)
            infos = [info for info in ours.inventory.tensors.values() if info.file == file]
            places |= {info.name: name for info in infos}
            changed = [info.name for info in infos if info.name in new]
            if changed:
                _patch(root / file, out / name, infos, left, new)
                result.changed += changed
            else:
                result.same[name] = copy_file_atomic(root / file, out / name)
            progress(ours.inventory.files[file])
        if plan.added:
            result.added = _add(plan.added, source, right, out / ADDED)
            places |= dict.fromkeys(result.added, ADDED)
    for name in ours.inventory.side_files:
        if name not in (PROVENANCE, CONFIG, INDEX, *plan.files):
            copy_file_atomic(root / name, out / name)
    for name in plan.files:
        copy_file_atomic(there / name, out / name)
    result.files = plan.files
    if len(set(places.values())) > 1 or (root / INDEX).is_file():
        _write_index(root, out, ours.inventory, source.inventory, places)
    _write_config(plan, root, out)
    return result


class _NewContents:
    """What the tensors of some weights become, encoded when the first of a weight's tensors is written.

    Weights that engines fuse share their global scale.
    """

    def __init__(self, weights: list[Weight], ours: Checkpoint, source: Checkpoint, reader: Reader) -> None:
        self._ours, self._source, self._reader = ours, source, reader
        self._twins = {weight.name: weight for weight in source.weights}
        self._weight_of = {name: weight for weight in weights for name in ours.tensors_of(weight)}
        self._ready: dict[str, Array] = {}
        self._amax: dict[str, Floats] = {}
        for weight in (w for w in weights if ours.formats[w.name].shares_scale):
            key = _scale_key(weight)
            amax = largest(self._dense(weight))[0]
            self._amax[key] = np.maximum(self._amax[key], amax) if key in self._amax else amax

    def __contains__(self, name: str) -> bool:
        return name in self._weight_of

    def take(self, name: str) -> Array:
        """The new content of a tensor; it can be asked for once."""
        if name not in self._ready:
            self._ready |= self._encode(self._weight_of[name])
        return self._ready.pop(name)

    def _dense(self, weight: Weight) -> Array:
        return self._source.read(self._reader, self._twins[weight.name])

    def _encode(self, weight: Weight) -> dict[str, Array]:
        assert self._ours.dialect is not None
        fmt, spelling = self._ours.formats[weight.name], self._ours.dialect.spelling
        amax = self._amax.get(_scale_key(weight))
        options: dict[str, Any] = {} if amax is None else {"amax": amax}
        if amax is not None and fmt.has_global_scale and spelling.global_scale_inv:
            # the stored reciprocal is the exact number
            options = {"global_scale_inv": np.float32(1) / global_scale(amax, fmt, get_search(SEARCH, fmt))}
        elif fmt.has_global_scale and spelling.power_of_two:
            options["power_of_two"] = True
        tensor = encode(self._dense(weight), fmt, SEARCH, **options)
        outputs = self._ours.stored(weight)
        infos = {output.name: self._ours.inventory.tensors[output.name] for output in outputs}
        content: dict[str, Array] = {name: np.empty(info.nbytes, np.uint8) for name, info in infos.items()}
        for chunk in spelling.write(outputs, fmt, tensor, 0, 0):
            values = np.frombuffer(bytes_of(chunk.array), np.uint8)
            start = chunk.start * itemsize(infos[chunk.output.name].dtype)
            content[chunk.output.name][start : start + values.size] = values
        return content


def _scale_key(weight: Weight) -> str:
    """Stacks have a global scale for each expert; matrices share one with their group."""
    return weight.group or weight.name


def _patch(path: Path, out: Path, infos: list[TensorInfo], reader: Reader, new: _NewContents) -> None:
    """Copy a file of weights, with the contents of some tensors changed."""
    ordered = sorted(infos, key=lambda info: info.offset)
    start, total = ordered[0].offset, path.stat().st_size
    ends = [start, *(info.offset + info.nbytes for info in ordered)]
    starts = [*(info.offset for info in ordered), total]
    gaps = tuple((a, b) for a, b in zip(ends, starts, strict=True) if b > a)
    layout = Layout(read_start(path, start), [info.offset for info in infos], total, gaps)
    with ShardWriter(out, layout) as writer:
        for info in ordered:
            if info.name in new:
                content = bytes_of(new.take(info.name))
                if len(content) != info.nbytes:
                    raise CheckpointError(f"{info.name} would change its size; the checkpoint cannot be repaired")
                writer.write_at(info.offset, content)
                continue
            offset = info.offset
            for chunk in reader.chunks(info.name, _CHUNK) if info.nbytes else ():
                writer.write_at(offset, chunk)
                offset += len(chunk)
        writer.commit()


def _add(weights: list[Weight], source: Checkpoint, reader: Reader, out: Path) -> list[str]:
    """Write the tensors of weights that were missing, as the source has them."""
    tensors = source.inventory.tensors
    names = [name for weight in weights for name in weight.sources]
    layout = build_header([(name, tensors[name].dtype, tensors[name].shape) for name in names])
    with ShardWriter(out, layout) as writer:
        for name, offset in zip(names, layout.offsets, strict=True):
            for chunk in reader.chunks(name, _CHUNK) if tensors[name].nbytes else ():
                writer.write_at(offset, chunk)
                offset += len(chunk)
        writer.commit()
    return names


def _write_index(root: Path, out: Path, ours: Inventory, source: Inventory, places: dict[str, str]) -> None:
    index = root / INDEX
    content = parse_object(read_small(index), str(index)) if index.is_file() else {}
    sizes = {**{n: i.nbytes for n, i in source.tensors.items()}, **{n: i.nbytes for n, i in ours.tensors.items()}}
    metadata = content.get("metadata")
    total = sum(sizes[name] for name in places)
    content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    content["weight_map"] = dict(sorted(places.items()))
    write_file_atomic(out / INDEX, _json(content))


def _write_config(plan: RepairPlan, root: Path, out: Path) -> None:
    """config.json last, so that no half-written folder looks like a checkpoint."""
    extra = root / FILE
    if plan.settings is not None and extra.is_file():
        content = parse_object(read_small(extra), str(extra), strict=False)
        settings = content.setdefault("quantization", {})
        settings["exclude_modules"] = plan.settings["ignore"]
        if "quant_algo" in plan.settings:
            settings["quant_algo"] = plan.settings["quant_algo"]
        (out / FILE).unlink(missing_ok=True)
        write_file_atomic(out / FILE, _json(content))
    if plan.config is not None:
        write_file_atomic(out / CONFIG, _json(plan.config))
    elif (root / CONFIG).is_file():
        copy_file_atomic(root / CONFIG, out / CONFIG)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def summary_of(result: Repaired) -> Iterator[str]:
    """Say in a few lines what a repair did."""
    if result.added:
        yield f"added       {len(result.added):,} tensors of the source"
    if result.changed:
        yield f"encoded     {len(result.changed):,} tensors again"
    if result.files:
        yield f"copied      {', '.join(result.files)}"
    yield f"unchanged   {len(result.same):,} files of weights, byte for byte"
