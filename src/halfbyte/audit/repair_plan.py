"""What of a checkpoint's problems a repair can mend from its source, and how; nothing is written here."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from halfbyte.audit.finding import Finding
from halfbyte.audit.run_audit import Audit
from halfbyte.checkpoint.config import QUANTIZATION, parts_of
from halfbyte.errors import CheckpointError
from halfbyte.models import Weight
from halfbyte.source.checkpoint import Checkpoint

_AGAIN = (
    *("scale-not-finite", "global-scale", "scale-underflow", "scale-subnormal", "dead-matrix"),
    *("unequal-global-scales", "worse-than-nearest"),
)
_IGNORE = ("wide-but-not-ignored", "mtp-not-ignored", "ignored-but-quantized", "ignore-anchored")
_BARE = "model.safetensors"
BACKBONE = "model_backbone.safetensors"
"""The new name of a bare file beside an index: loaders prefer the usual name to the index."""


@dataclass
class RepairPlan:
    """What will be done. Names of weights that are encoded again from the source, of weights that are added from it,
    of files that are copied from it; ``config`` is the new config.json and ``extra`` the new hf_quant_config.json where
    they change; ``left`` are problems that no repair mends.
    """

    again: list[Weight] = field(default_factory=list)
    added: list[Weight] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    left: list[Finding] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.again or self.added or self.files or self.renamed or self.config)


def plan_repair(found: Audit, ours: Checkpoint, source: Checkpoint, other_files: bool) -> RepairPlan:
    """Decide for each finding of an audit against the source; ``other_files``: also copy files that merely differ."""
    plan = RepairPlan()
    incomplete = {name for f in found.problems if f.code == "incomplete-weight" for name in f.tensors}
    missing = {w.name for w in source.weights} - {w.name for w in ours.weights} - incomplete
    codes = {finding.code for finding in found.problems}
    plan.added = [w for w in source.weights if w.name in missing and w.name not in source.formats]
    unreadable = missing - {w.name for w in plan.added}
    names: set[str] = set()
    for finding in found.findings:
        if finding.code in _AGAIN:
            names |= set(finding.tensors)
        elif finding.code == "files-missing" or (finding.code == "files-differ" and other_files):
            plan.files += finding.tensors
        elif finding.code == "tokenizer-missing":
            plan.files += [
                n for n in source.inventory.side_files if n.startswith(("token", "vocab", "merges", "special"))
            ]
        elif finding.code == "bare-file-beside-index":
            plan.renamed[_BARE] = BACKBONE
        elif finding.is_problem and not _mended_elsewhere(finding, plan.added, unreadable):
            plan.left.append(finding)
    if plan.added and _BARE in ours.inventory.files:
        plan.renamed[_BARE] = BACKBONE
    plan.files = list(dict.fromkeys(plan.files))
    plan.again = _to_encode(ours, source, names)
    if codes & {*_IGNORE, "declared-w4a4"} or _new_matrices(plan.added):
        plan.config, plan.settings = _new_config(ours, plan.added, "declared-w4a4" in codes)
    return plan


def _mended_elsewhere(finding: Finding, added: list[Weight], unreadable: set[str]) -> bool:
    if finding.code in (*_IGNORE, "declared-w4a4"):
        return True
    if finding.code.startswith("source-"):
        return not unreadable & set(finding.tensors)
    kinds = {"mtp-missing": "mtp.", "vision-missing": "vision.", "audio-missing": "audio."}
    prefix = kinds.get(finding.code)
    return prefix is not None and any(weight.role.startswith(prefix) for weight in added)


def _to_encode(ours: Checkpoint, source: Checkpoint, names: set[str]) -> list[Weight]:
    """Weights of which a tensor was named, with all that must share a scale with them."""
    there = {w.name: w for w in source.weights if w.name not in source.formats}
    bad = [
        w
        for w in ours.weights
        if w.name in ours.formats and (w.name in names or not names.isdisjoint(ours.tensors_of(w)))
    ]
    groups = {w.group for w in bad if w.group is not None}
    chosen = [w for w in ours.weights if w.name in ours.formats and (w in bad or w.group in groups)]
    for weight in chosen:
        twin = there.get(weight.name)
        if twin is None or twin.shape != weight.shape:
            raise CheckpointError(
                f"{weight.name} must be encoded again, and {source.inventory.source} does not hold it unquantized in "
                f"shape {list(weight.shape)}; name the unquantized source"
            )
    return chosen


def _new_matrices(added: list[Weight]) -> bool:
    return any(len(weight.shape) > 1 for weight in added)


def _new_config(
    ours: Checkpoint, added: list[Weight], weight_only: bool
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """config.json with an ignore list that fits the tensors, and the settings in it; None without such a list."""
    dialect = ours.dialect
    if dialect is None or dialect.declared(ours.inventory) is None:
        return None, None
    quantized = [(w, ours.formats[w.name]) for w in ours.weights if w.name in ours.formats]
    kept = [*(w for w in ours.weights if w.name not in ours.formats), *added]
    config = copy.deepcopy(ours.inventory.config)
    settings = _settings_in(config)
    if settings is None:
        return None, None
    wanted = dialect.config(quantized, kept, {})
    settings["ignore"] = wanted["ignore"]
    settings.pop("exclude_modules", None)
    if weight_only:
        for group in settings.get("config_groups", {}).values():
            group["input_activations"] = None
        if settings.get("quant_algo") == "NVFP4":
            settings["quant_algo"] = "W4A16_NVFP4"
    return config, settings


def _settings_in(config: dict[str, Any]) -> dict[str, Any] | None:
    """The very object in config.json that says how the checkpoint is quantized."""
    for _, part in parts_of(config):
        for key in QUANTIZATION:
            settings = part.get(key)
            if isinstance(settings, dict) and settings:
                inner = settings.get("quantization")
                return inner if isinstance(inner, dict) else settings
    return None
