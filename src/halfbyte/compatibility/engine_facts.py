"""What engines lose, refuse or get wrong: facts in ``engine_facts.yaml``, matched with what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import metadata, resources
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from halfbyte.errors import HalfbyteError
from halfbyte.models.roles import is_known, is_under
from halfbyte.models.strict_yaml import load_yaml

Effect = Literal["wrong", "refuses", "loses", "rounds", "needs"]
OURS = "halfbyte"
PLAIN = "plain"
"""Stands for the dialect of a checkpoint in which nothing is quantized."""


class Fact(BaseModel):
    """One thing that an engine does; the file explains the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    effect: Effect
    what: str
    known: Literal["ran", "read"]
    version: str = ""
    link: str = ""
    hardware: str = ""
    dialects: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    per_expert: bool | None = None
    mixed: bool = False

    @field_validator("roles")
    @classmethod
    def _roles_exist(cls, roles: tuple[str, ...]) -> tuple[str, ...]:
        for role in roles:
            if not is_known(role):
                raise ValueError(f"there is no role {role!r}")
        return roles


class Load(BaseModel):
    """Formats (patterns of names) that an engine loads in a dialect, how that is known, and with what restriction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dialect: str
    formats: tuple[str, ...] = Field(min_length=1)
    known: Literal["ran", "library", "read"]
    version: str = ""
    where: str = ""

    def holds(self, dialect: str, fmt: str) -> bool:
        """Whether this is about a format in a dialect."""
        return dialect == self.dialect and any(fnmatchcase(fmt, pattern) for pattern in self.formats)


class Engine(BaseModel):
    """An engine, the version that was tried last ("": none), and the dialects it reads.

    Each entry of ``loads`` and ``facts`` has the version that it was checked with; halfbyte's own are tested in each.
    ``packages`` are the distributions that bring the engine. ``loads`` is what was found to load, ``facts`` what it
    loses, refuses or gets wrong. ``families`` are those whose quantized checkpoints it was tried with, or whose names
    were read in its source; empty: it reads any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str = ""
    packages: tuple[str, ...] = ()
    reads: tuple[str, ...] = Field(min_length=1)
    families: tuple[str, ...] = ()
    loads: tuple[Load, ...] = ()
    facts: tuple[Fact, ...] = ()

    @model_validator(mode="after")
    def _every_entry_has_a_version(self) -> Engine:
        entries: tuple[Load | Fact, ...] = (*self.loads, *self.facts)
        for entry in entries:
            if not entry.version and self.name != OURS:
                raise ValueError(f"an entry of {self.name} names no version that it was checked with: {entry}")
        return self

    def installed(self) -> dict[str, str]:
        """Return the versions of the engine's packages in this environment; {} where it is not installed."""
        versions: dict[str, str] = {}
        for package in self.packages:
            with suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
        return versions

    def load(self, dialect: str, fmt: str) -> Load | None:
        """What is known of loading a format in a dialect; None: it does not, or nobody looked."""
        return next((load for load in self.loads if load.holds(dialect, fmt)), None)


class RoleHolding(NamedTuple):
    """What a checkpoint holds of one role: in which formats ("" where not quantized), how much, in which spelling."""

    role: str
    formats: frozenset[str]
    tensors: int
    nbytes: int
    per_expert: bool


@dataclass(frozen=True)
class CompatibilityNote:
    """What an engine does with a checkpoint, and with how much of it.

    ``effect`` is one of Effect, or ``unknown`` where nobody looked. ``tensors`` and ``nbytes`` count the weights that
    it is about; 0 where it is about the whole checkpoint.
    """

    engine: str
    version: str
    effect: str
    what: str
    hardware: str = ""
    known: str = ""
    link: str = ""
    tensors: int = 0
    nbytes: int = 0


@cache
def engines() -> tuple[Engine, ...]:
    """All engines of the file, in its order."""
    text = resources.files("halfbyte.compatibility").joinpath("engine_facts.yaml").read_text(encoding="utf-8")
    document: Any = load_yaml(text)
    try:
        return tuple(Engine.model_validate(entry) for entry in document["engines"])
    except ValidationError as error:
        raise HalfbyteError(f"engine_facts.yaml: {error}") from error


def compatibility_notes(
    family: str, dialect: str | None, holdings: Sequence[RoleHolding]
) -> dict[str, list[CompatibilityNote]]:
    """What each engine is known to do with a checkpoint; an empty list: it reads the dialect, and loses nothing known.

    ``dialect``: None where nothing is quantized.
    """
    spelling = dialect or PLAIN
    notes_of: dict[str, list[CompatibilityNote]] = {}
    for engine in engines():
        notes = [f for fact in engine.facts if (f := _apply(engine, fact, family, spelling, holdings))]
        untried = ""
        if spelling not in engine.reads:
            untried = f"not tried with the dialect {spelling}"
        elif dialect is not None and engine.families and family not in engine.families:
            untried = f"not tried with quantized checkpoints of the family {family}"
        if untried and not any(f.effect == "refuses" and not f.hardware for f in notes):
            notes = [CompatibilityNote(engine.name, engine.version, "unknown", untried)]
        if everywhere := [f for f in notes if f.effect == "refuses" and not f.hardware]:
            # what does not load loses nothing
            notes = everywhere
        notes_of[engine.name] = notes
    return notes_of


def _apply(
    engine: Engine, fact: Fact, family: str, dialect: str, holdings: Sequence[RoleHolding]
) -> CompatibilityNote | None:
    if (fact.dialects and dialect not in fact.dialects) or (fact.families and family not in fact.families):
        return None
    matching = [h for h in holdings if not fact.roles or any(is_under(h.role, role) for role in fact.roles)]
    if fact.formats:
        matching = [h for h in matching if any(fnmatchcase(name, p) for name in h.formats for p in fact.formats)]
    if fact.per_expert is not None:
        matching = [h for h in matching if h.per_expert == fact.per_expert]
    if not matching or (fact.mixed and len(frozenset().union(*(h.formats for h in holdings)) - {""}) < 2):
        return None
    narrow = bool(fact.roles or fact.formats)
    return CompatibilityNote(
        engine.name,
        fact.version,
        fact.effect,
        fact.what,
        fact.hardware,
        fact.known,
        fact.link,
        sum(h.tensors for h in matching) if narrow else 0,
        sum(h.nbytes for h in matching) if narrow else 0,
    )
