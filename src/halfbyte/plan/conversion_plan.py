"""The plan: inventory x recipe x dialect, complete and exact before any weight is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

from halfbyte.dialects import Dialect
from halfbyte.dialects.modelopt_config import FILE as MODELOPT_FILE
from halfbyte.models.smoothing_groups import SmoothingGroup
from halfbyte.plan import sealed_provenance
from halfbyte.plan.calibration_use import CalibrationUse
from halfbyte.plan.configuration import CONFIG, INDEX, PLAN_VERSION, PROVENANCE
from halfbyte.plan.resources import Limits, Resources, find_resources
from halfbyte.plan.sealed_provenance import Outcome
from halfbyte.plan.shards import Item, Shard
from halfbyte.plan.summary import list_outputs, list_sources, summarize_classes, summarize_fates
from halfbyte.recipes import Recipe
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.smoothing import SMOOTHING_FILE, layout

__all__ = ["CONFIG", "INDEX", "PLAN_VERSION", "PROVENANCE", "Plan"]


@dataclass(frozen=True)
class Plan:
    """Everything about the output that does not depend on the weights' values.

    ``origin``: what halfbyte.json says of source, dialect and recipe.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    dialect: Dialect
    items: list[Item]
    shards: list[Shard]
    index: bytes | None
    config: bytes | None
    origin: dict[str, Any]
    extra_files: dict[str, bytes]
    notes: list[str]
    calibration_use: CalibrationUse | None = None

    @property
    def data_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(item.nbytes for item in self.items)

    @property
    def shard_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(shard.layout.total for shard in self.shards)

    @property
    def repository_bytes(self) -> int:
        """Bytes of the whole output folder: weight files, index, configuration, side files."""
        written = [self.provenance, *self.written.values()]
        return self.shard_bytes + self.smoothing_bytes + sum(map(len, written)) + self.side_file_bytes

    @property
    def written(self) -> dict[str, bytes]:
        """Files whose content is known already, in the order in which they are written; config.json is the last."""
        files = dict(self.extra_files)
        if self.index is not None:
            files[INDEX] = self.index
        if self.config is not None:
            files[CONFIG] = self.config
        return files

    @property
    def file_bytes(self) -> dict[str, int]:
        """Bytes of every file of the output but halfbyte.json, by name."""
        side_bytes = self.checkpoint.inventory.side_files
        return {
            **{shard.name: shard.layout.total for shard in self.shards},
            **({SMOOTHING_FILE: self.smoothing_bytes} if self.smoothings else {}),
            **{name: side_bytes[name] for name in self.side_files},
            **{name: len(content) for name, content in self.written.items()},
        }

    @cached_property
    def provenance(self) -> bytes:
        """halfbyte.json with zeros for the hashes that are known only when the files are written."""
        return self.sealed_provenance(Outcome())

    def sealed_provenance(self, outcome: Outcome) -> bytes:
        """Write halfbyte.json with what is known only when the other files are written."""
        calibrated = sorted({item.weight.name for item in self.items if item.calibrated})
        return sealed_provenance.spell(self.origin, self.fingerprint, self.file_bytes, calibrated, outcome)

    @property
    def smoothings(self) -> list[SmoothingGroup]:
        """Groups of weights whose scales for smoothing the conversion chooses."""
        return self.calibration_use.smoothings if self.calibration_use else []

    @property
    def smoothing_bytes(self) -> int:
        """Bytes of the file that holds these scales."""
        return layout(self.smoothings).total if self.smoothings else 0

    @property
    def side_file_bytes(self) -> int:
        """Bytes of the files that are copied unchanged."""
        if self.dialect.package.standalone:
            return 0
        inventory = self.checkpoint.inventory
        replaced = set(inventory.side_files) - set(self.side_files)
        return inventory.side_file_bytes - sum(inventory.side_files[name] for name in replaced)

    @property
    def side_files(self) -> list[str]:
        """Files that are copied unchanged."""
        if self.dialect.package.standalone:
            return []
        source = self.checkpoint.dialect
        replaced = {
            PROVENANCE,
            SMOOTHING_FILE,
            MODELOPT_FILE,
            *self.extra_files,
            *(source.package.files if source else ()),
        }
        return [name for name in self.checkpoint.inventory.side_files if name not in replaced]

    @property
    def config_files(self) -> list[str]:
        """Files of this plan's own beside the weights, without further ones of dialects."""
        return [PROVENANCE] if self.config is None else [CONFIG, PROVENANCE]

    @property
    def parameters(self) -> int:
        """Elements of all weights that the output holds."""
        return sum(item.parameters for item in self.items if item.action not in ("drop", "calibrate"))

    @property
    def bits_per_weight(self) -> float:
        """8 x data bytes / parameters, over everything that the output holds."""
        return 8 * self.data_bytes / max(self.parameters, 1)

    def __repr__(self) -> str:
        """One line: source, recipe, dialect, size."""
        return (
            f"<Plan {self.checkpoint.inventory.source}: {self.recipe.name} in {self.dialect.name}, "
            f"{self.repository_bytes:,} bytes, {self.bits_per_weight:.3f} bits per weight>"
        )

    def _repr_html_(self) -> str:
        """A table of the classes of weights, for notebooks."""
        columns = ("role", "format", "tensors", "parameters", "bytes", "reason")
        classes = self.summary()["classes"]
        rows = [["" if entry[key] is None else str(entry[key]) for key in columns] for entry in classes]
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<p>{escape(repr(self))}</p><table><tr>{head}</tr>{body}</table>"

    @property
    def tensors(self) -> int:
        """The number of tensors that the output has."""
        return sum(len(item.outputs) for item in self.items)

    def resources(self, limits: Limits | None = None) -> Resources:
        """Threads and memory of a conversion within these limits, the process with this plan included."""
        units = (unit for shard in self.shards for unit in shard.units)
        tensors = len(self.checkpoint.inventory.tensors) + self.tensors
        smoothed = {w.name for g in self.smoothings for w in (*g.consumers, *(p.weight for p in g.producers))}
        limits = limits or Limits()
        resources = find_resources(units, self.checkpoint.formats, tensors, limits, smoothed)
        if self.checkpoint.inventory.remote is None:
            return resources
        return resources._replace(memory=resources.memory + limits.ahead_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides the output's bytes."""
        parts = (
            PLAN_VERSION,
            self.checkpoint.inventory.fingerprint,
            self.recipe.model_dump(mode="json"),
            self.dialect.name,
            self.origin,
        )
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for shard in self.shards:
            digest.update(shard.name.encode() + shard.layout.header)
        for name, content in sorted(self.extra_files.items()):
            digest.update(name.encode() + content)
        digest.update(self.config or b"")
        if self.calibration_use:
            names = [i.weight.name for i in self.items if i.weighted], [group.name for group in self.smoothings]
            digest.update(json.dumps([self.calibration_use.calibration.digest, names]).encode())
        constants = [(o.name, o.constant) for i in self.items for o in i.outputs if o.constant is not None]
        digest.update(repr(constants).encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Exact sizes and one entry per class (role, action, format, reason) of weights; JSON can hold it.

        ``tensors`` counts source tensors in classes and output tensors in total; bytes are those of the output.
        """
        return {
            "data_bytes": self.data_bytes,
            "header_bytes": self.shard_bytes - self.data_bytes,
            "index_bytes": len(self.index or b""),
            "side_file_bytes": self.side_file_bytes,
            "repository_bytes": self.repository_bytes,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "classes": summarize_classes(self.checkpoint, self.items),
            **summarize_fates(self.checkpoint, self.items),
            "fold_bytes": self.smoothing_bytes,
            "importance": self.calibration_use.to_dict() if self.calibration_use else None,
            "notes": self.notes,
        }

    def to_dict(self) -> dict[str, Any]:
        """The summary, every source tensor's fate and every output tensor's place."""
        return {
            "source": self.checkpoint.inventory.source,
            "recipe": self.recipe.name,
            "dialect": self.dialect.name,
            "fingerprint": self.fingerprint,
            **self.summary(),
            "sources": list_sources(self.checkpoint, self.items),
            "outputs": list_outputs(self.shards),
        }
