"""What a dialect is: an engine's spelling of quantized weights, its configuration, and what else its files have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.checkpoint import Inventory
from halfbyte.dialects.capabilities import ActivationScales, Package, UnquantizedLayout
from halfbyte.dialects.declared import Declared
from halfbyte.dialects.outputs import CacheScales
from halfbyte.dialects.spelling import Spelling
from halfbyte.errors import PlanError
from halfbyte.formats import Format
from halfbyte.models import Weight


class Dialect(ABC):
    """What one family of engines reads.

    Every dialect has a ``name``, what it is ``about`` (a few words for lists), a ``spelling`` of quantized weights,
    ``claims`` and ``config``. The other parts have the behaviour of plain checkpoints unless a dialect brings its own:
    ``unquantized`` weights, scales of ``activations``, ``cache_scales`` (None: engines take none) and the ``package``
    of files.
    """

    name: str
    about: str
    spelling: Spelling
    unquantized: UnquantizedLayout = UnquantizedLayout()
    activations: ActivationScales = ActivationScales()
    cache_scales: CacheScales | None = None
    package: Package = Package()

    @abstractmethod
    def claims(self, inventory: Inventory) -> bool:
        """Return whether a checkpoint is written in this dialect."""

    @abstractmethod
    def config(
        self,
        quantized: Sequence[tuple[Weight, Format]],
        kept: Sequence[Weight],
        activations: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` of the output's config.json.

        ``activations``: how the inputs of weights (by name) are quantized, as a word of recipes (none, dynamic,
        static) or as ``ActivationScales.stated`` gave it; weights without an entry get what is usual.
        """

    def declared(self, inventory: Inventory) -> Declared | None:
        """Return what a checkpoint's configuration says of each module; None where the tensors alone decide."""
        return None

    def for_model(self, inventory: Inventory) -> Dialect:
        """Return this dialect for one model, where names and layout depend on it; PlanError if it cannot hold it."""
        return self

    def notes(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> list[str]:
        """List what a user should know about an output before writing it."""
        return []


_DIALECTS: dict[str, Dialect] = {}


def register_dialect(dialect: Dialect) -> Dialect:
    """Add a dialect to the registry under its name; PlanError if the name belongs to another one."""
    known = _DIALECTS.setdefault(_key(dialect.name), dialect)
    if known is not dialect:
        raise PlanError(f"there is a dialect {known.name!r} already ({known.about}); give the new one another name")
    return dialect


def get_dialect(name: str | Dialect) -> Dialect:
    """Return the dialect of this name; PlanError names the known ones otherwise."""
    if isinstance(name, Dialect):
        return name
    dialect = _DIALECTS.get(_key(name))
    if dialect is None:
        raise PlanError(f"unknown dialect {name!r}; known dialects: {', '.join(d.name for d in _DIALECTS.values())}")
    return dialect


def list_dialects() -> list[Dialect]:
    """List all registered dialects."""
    return list(_DIALECTS.values())


def _key(name: str) -> str:
    """Names are alike whether they are written with - or with _."""
    return name.replace("_", "-")
