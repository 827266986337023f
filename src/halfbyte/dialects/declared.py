"""What a configuration says of each module: whether it is quantized.

Engines build a model from the configuration before they see a tensor, so that a module which the files hold otherwise
does not load, or loads as something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from halfbyte.models.regex import Patterns


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
