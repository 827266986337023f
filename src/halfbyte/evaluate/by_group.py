"""Which weights hurt: the divergence when one group of them is quantized and everything else is not.

The recipe is carried out once, by the usual conversion, into a folder beside the result; its weights are then put into
the source's model group by group, decoded. So a group's numbers are those of the bytes that ``quantize`` writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from halfbyte.checkpoint import Reader, nbytes, write_file_atomic
from halfbyte.checkpoint.scratch import scratch_folder
from halfbyte.convert.conversion import convert
from halfbyte.errors import MeasurementError, OutputError, PlanError
from halfbyte.evaluate.divergence import TokenScores
from halfbyte.evaluate.fingerprint import content_hash
from halfbyte.evaluate.forward import reference_key, score, store_reference
from halfbyte.evaluate.models import check_length, opened
from halfbyte.evaluate.placement import places
from halfbyte.evaluate.reference_logprobs import Cache, Reference
from halfbyte.evaluate.sensitivity_file import ALL, VERSION, read_sensitivity
from halfbyte.evaluate.settings import TextSettings
from halfbyte.evaluate.text import Passage, passage_of
from halfbyte.evaluate.weight_errors import WeightError, compare_weights
from halfbyte.models import Weight
from halfbyte.models.roles import bare_role, is_under
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.smoothing_use import stored_smoothings
from halfbyte.recipes import Recipe, load_recipe
from halfbyte.runtime.loading import load_tokenizer
from halfbyte.source.checkpoint import Checkpoint

By = Literal["group", "role", "weight"]
Progress = Callable[[int, int], None]


@dataclass
class SensitivityUnit:
    """Weights that are quantized together."""

    name: str
    weights: list[Weight]


def units_of(weights: list[Weight], by: By) -> list[SensitivityUnit]:
    """Weights in groups: ``group``: what engines fuse, and all experts of a layer; ``role``: a role of a layer;
    ``weight``: each by itself.
    """
    units: dict[str, SensitivityUnit] = {}
    for weight in weights:
        name = weight.name
        if by == "role":
            name = weight.role if weight.layer is None else f"layers.{weight.layer}.{weight.role}"
        elif by == "group" and is_under(bare_role(weight.role), "experts"):
            name = f"{weight.name.partition('.experts.')[0]}.experts"
        elif by == "group":
            name = weight.group or weight.name
        units.setdefault(name, SensitivityUnit(name, [])).weights.append(weight)
    return list(units.values())


def _joined(units: list[SensitivityUnit], places: dict[str, str], model: Any) -> list[SensitivityUnit]:
    """Units of tied embeddings that a checkpoint holds twice as one: the model has one parameter for both."""
    owners: dict[int, SensitivityUnit] = {}
    for unit in units:
        ends = [w for w in unit.weights if w.role in ("embedding", "lm_head")]
        owner = owners.setdefault(id(model.get_parameter(places[ends[0].name])), unit) if ends else unit
        if owner is not unit:
            owner.weights += unit.weights
            unit.weights = []
    return [unit for unit in units if unit.weights]


def sensitivity(
    source: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    settings: TextSettings | None = None,
    *,
    by: By = "group",
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure every group of weights that a recipe quantizes; the sensitivity file's header with ``groups``.

    ``out``: the sensitivity file (JSON lines, docs/evaluation.md). A run that was interrupted continues there; a file
    of another measurement is an OutputError. In memory are the source's model and the quantized weights in 4 bit.
    ``progress`` is called with the number of groups done and their total, ``announce`` with a line at the beginning
    where an earlier run is continued.
    """
    settings = settings or TextSettings()
    checkpoint = Checkpoint.open(source)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    plan = make_plan(checkpoint, loaded, "halfbyte")
    passage = passage_of(settings, checkpoint.inventory.root, load_tokenizer(source))
    device = str(settings.device or "cpu")
    key = [plan.fingerprint, content_hash(checkpoint), passage.protocol.as_dict(), by, device, VERSION]
    header = {
        "halfbyte": "sensitivity",
        "version": VERSION,
        "source": str(source),
        "recipe": loaded.name,
        "by": by,
        "protocol": passage.protocol.as_dict(),
        "key": hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest(),
    }
    path = Path(out)
    groups = _continue(path, header)
    folder = path.with_name(f"{path.name}.{plan.fingerprint[:12]}.work")
    done = {group["group"] for group in groups}
    place = nullcontext(settings.cache) if settings.cache else scratch_folder("halfbyte")
    if groups and announce:
        finished = "complete already" if ALL in done else "continued"
        announce(f"{path} is {finished}: {len(groups)} groups were measured before")
    if ALL not in done:
        with place as stored:
            job = _Job(checkpoint, source, folder, passage, settings, Cache(str(stored)))
            for group in job.run(plan, by, done, progress or (lambda *_: None)):
                _append(path, group)
                groups.append(group)
    shutil.rmtree(folder, ignore_errors=True)
    return {**header, "groups": groups}


def _continue(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups that an earlier run has measured; a new file where there is none."""
    if not path.exists():
        write_file_atomic(path, (json.dumps(header) + "\n").encode())
        return []
    earlier = read_sensitivity(path)
    if earlier.get("key") != header["key"]:
        raise OutputError(
            f"{path} holds another measurement (of {earlier.get('source')} with {earlier.get('recipe')}); choose "
            "another name or remove it"
        )
    groups: list[dict[str, Any]] = earlier["groups"]
    return groups


def _append(path: Path, group: dict[str, Any]) -> None:
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            file.write(b"\n" if torn else b"")
        file.write(json.dumps(group).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@dataclass
class _Job:
    """One source, one recipe, one passage."""

    checkpoint: Checkpoint
    source: str | Path
    folder: Path
    passage: Passage
    settings: TextSettings
    cache: Cache

    def run(self, plan: Plan, by: By, done: set[str], progress: Progress) -> Iterator[dict[str, Any]]:
        """The groups that are still to be measured, then all together."""
        if not (self.folder / "config.json").exists():
            convert(plan, self.folder)
        quantized = Checkpoint.open(self.folder)
        with Reader(self.checkpoint.inventory) as reader:
            if stored_smoothings(self.folder, self.checkpoint, reader):
                raise PlanError(
                    f"recipe {plan.recipe.name} moves scales of its weights into the norms before them, so they make "
                    "no sense one at a time; leave the smoothing out"
                )
        errors = {weight.name: error for weight, error in compare_weights(self.folder, self.source)}
        weights = [w for w in self.checkpoint.weights if w.name in quantized.formats]
        dtype, device = self.settings.dtype, self.settings.device
        with opened(self.source, dtype, True, device) as model, opened(self.folder, dtype, False, device) as codes:
            check_length(model, self.source, self.passage.protocol.length)
            reference = self._reference(model)
            parameters = places(model, weights)
            weights = [w for w in weights if w.name in parameters]
            units = [*_joined(units_of(weights, by), parameters, model), SensitivityUnit(ALL, weights)]
            for number, unit in enumerate(units):
                if unit.name not in done:
                    with _quantized(model, codes, sorted({parameters[w.name] for w in unit.weights})):
                        scores = self._score(model, unit, reference)
                    yield {
                        **self._about(unit, errors),
                        "perplexity": scores.perplexity,
                        "kl": scores.divergence,
                    }
                progress(number + 1, len(units))

    def _score(self, model: Any, unit: SensitivityUnit, reference: Reference) -> TokenScores:
        try:
            return score(model, self.passage, reference)
        except MeasurementError as error:
            raise MeasurementError(f"with {unit.name} quantized: {error}") from error

    def _about(self, unit: SensitivityUnit, errors: dict[str, WeightError]) -> dict[str, Any]:
        entries = [errors[w.name] for w in unit.weights]
        formats = {entry.error.format for entry in entries}
        squares = sum(entry.error.squares for entry in entries)
        return {
            "group": unit.name,
            "weights": [w.name for w in unit.weights],
            "roles": sorted({w.role for w in unit.weights}),
            "layers": sorted({w.layer for w in unit.weights if w.layer is not None}),
            "format": formats.pop() if len(formats) == 1 else "mixed",
            "parameters": sum(entry.error.elements for entry in entries),
            "bytes": sum(entry.stored for entry in entries),
            "source_bytes": sum(nbytes(w.dtype, (math.prod(w.shape),)) for w in unit.weights),
            "relmse": sum(entry.error.squared_error for entry in entries) / squares if squares else 0.0,
        }

    def _reference(self, model: Any) -> Reference:
        """The source's log-probabilities, from the cache or measured now."""
        key = reference_key(
            content_hash(self.checkpoint), self.passage, self.settings.dtype, self.settings.device, True
        )
        return self.cache.find(key) or store_reference(self.cache, key, model, self.passage)


@contextmanager
def _quantized(model: Any, codes: Any, names: list[str]) -> Iterator[None]:
    """Put the decoded parameters ``names`` of the model ``codes`` in place of the model's own, for a while."""
    before: list[tuple[Any, torch.Tensor]] = []
    try:
        for name in names:
            parameter = model.get_parameter(name)
            path, _, last = name.rpartition(".")
            values = codes.get_submodule(path).decoded(last)
            before.append((parameter, parameter.data))
            parameter.data = values.to(parameter.dtype).contiguous()
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
