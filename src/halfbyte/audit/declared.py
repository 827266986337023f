"""What a configuration says of each module: whether it is quantized, and how its inputs are.

Engines build a model from the configuration before they see a tensor, so that a module which the files hold otherwise
does not load, or loads as something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from halfbyte.checkpoint import Inventory
from halfbyte.dialects.modelopt_config import settings_fields
from halfbyte.dialects.quantization_config import quantization_fields
from halfbyte.models import Weight
from halfbyte.models.regex import Patterns
from halfbyte.source.checkpoint import Checkpoint

LINEAR = "Linear"
# algorithms of ModelOpt whose inputs have one calibrated scale
_STATIC = ("NVFP4", "FP8")


@dataclass(frozen=True)
class Declared:
    """The lists of a configuration: modules that stay as they are, and, where only some are quantized, which.

    ``entries`` are the ignored ones as they are written; ``targets`` None: every Linear module that is not ignored.
    """

    entries: tuple[str, ...]
    targets: Patterns | None
    layers: frozenset[str] | None
    wildcards: bool

    def ignores(self, module: str) -> bool:
        """Whether the configuration leaves a module as it is."""
        if self.wildcards:
            return any(self.entry_matches(entry, module) for entry in self.entries)
        return _patterns(self.entries).match(module)

    def entry_matches(self, entry: str, module: str) -> bool:
        """Whether one entry of the ignore list is about a module."""
        if self.wildcards:
            return fnmatchcase(module, entry) or module == entry or module.startswith(f"{entry}.")
        return _patterns((entry,)).match(module)

    def quantizes(self, module: str) -> bool:
        """Whether an engine expects a Linear module to be quantized."""
        if self.layers is not None:
            return module in self.layers
        return (self.targets is None or self.targets.match(module)) and not self.ignores(module)


@lru_cache(maxsize=4096)
def _patterns(entries: tuple[str, ...]) -> Patterns:
    return Patterns(entries, "the ignore list of config.json")


def declared(inventory: Inventory, dialect: str) -> Declared | None:
    """What the configuration of a checkpoint says, None for dialects in which the tensors alone decide."""
    if dialect == "compressed-tensors":
        settings = quantization_fields(inventory)
        targets = [t for _, group in settings.fields("config_groups").members() for t in group.texts("targets")]
        by_class = LINEAR in targets
        patterns = None if by_class else Patterns(targets, "the targets of config.json")
        return Declared(tuple(settings.texts("ignore")), patterns, None, False)
    if dialect == "modelopt":
        settings = settings_fields(inventory)
        layers = settings.fields("quantized_layers") if "quantized_layers" in settings else None
        entries = [*settings.texts("ignore"), *settings.texts("exclude_modules")]
        named = None if layers is None else frozenset(layers.values)
        return Declared(tuple(dict.fromkeys(entries)), None, named, True)
    return None


class StaticInputs:
    """Which modules take the scale of their inputs from the file, by the configuration."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._settings = None
        if checkpoint.dialect is not None and checkpoint.dialect.name == "modelopt":
            self._settings = settings_fields(checkpoint.inventory)
            groups = [group for _, group in self._settings.fields("config_groups").members()]
            self._weight_only = bool(groups) and not any("input_activations" in group for group in groups)
            self._layers = self._settings.fields("quantized_layers")

    def wants(self, weight: Weight, module: str) -> bool:
        """Whether engines need a calibrated scale for one module of a quantized weight."""
        dialect = self._checkpoint.dialect
        if dialect is None or dialect.activations.scale(self._checkpoint.formats[weight.name]) is None:
            return False
        if self._settings is not None:
            stated = self._layers.fields(module) if module in self._layers else self._settings
            return stated.text("quant_algo").upper() in _STATIC and not self._weight_only
        inputs = dialect.activations.stated(self._checkpoint.inventory, weight)
        return bool(inputs) and (inputs or {}).get("dynamic") in (False, "local")
