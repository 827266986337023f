"""What a family's YAML file may say, and how the files under `families/` are read."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from halfbyte.errors import HalfbyteError
from halfbyte.models.name_templates import merge
from halfbyte.models.roles import ROLES, bare_role, is_known
from halfbyte.models.strict_yaml import load_yaml


class ExpertLayout(BaseModel):
    """One fused tensor of stacked experts, and the per-expert tensors that spell it, in row order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    parts: dict[str, str] = Field(min_length=1)


class NormReaders(BaseModel):
    """The roles that read a norm's output, in its own layer; not where a norm of ``unless`` is there too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    feeds: tuple[str, ...] = Field(min_length=1)
    unless: tuple[str, ...] = ()

    @field_validator("feeds")
    @classmethod
    def _roles_exist(cls, feeds: tuple[str, ...]) -> tuple[str, ...]:
        for role in feeds:
            if role not in ROLES:
                raise ValueError(f"there is no role {role!r}")
        return feeds


class FamilyFile(BaseModel):
    """The content of one file `families/<name>.yaml`; `docs/architectures.md` explains every key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    extends: str | None = None
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    mtp_prefixes: tuple[str, ...] = ()
    mtp_from_layer: str | None = None
    vision_prefixes: tuple[str, ...] = ()
    audio_prefixes: tuple[str, ...] = ()
    roles: dict[str, str] = {}
    experts: dict[str, ExpertLayout] = {}
    interleaved: bool = False
    transposed: bool = False
    groups: dict[str, tuple[str, ...]] = {}
    vision: dict[str, str] = {}
    quantized_suffixes: tuple[str, ...] = ()
    norms: dict[str, NormReaders] = {}
    zero_centred_norms: tuple[str, ...] = ()
    linear_up: bool = True
    smoothing: bool = True

    @field_validator("roles", "vision")
    @classmethod
    def _roles_exist(cls, roles: dict[str, str]) -> dict[str, str]:
        for template, role in roles.items():
            if not is_known(bare_role(role)):
                raise ValueError(f"{template}: there is no role {role!r}")
        return roles

    def extended(self, parent: FamilyFile) -> FamilyFile:
        """This file completed by `parent`: its entries entries come first and win."""
        entries: dict[str, Any] = {key: getattr(self, key) for key in self.model_fields_set}
        for key in ("roles", "experts", "groups", "vision", "norms"):
            entries[key] = merge(getattr(self, key), getattr(parent, key))
        inherited = {
            key: getattr(parent, key)
            for key in (
                *("prefixes", "mtp_prefixes", "mtp_from_layer", "vision_prefixes", "audio_prefixes"),
                *("quantized_suffixes", "zero_centred_norms", "linear_up", "smoothing"),
            )
        }
        return FamilyFile.model_construct(**{**inherited, **entries})


def parse(text: str, name: str) -> FamilyFile:
    """Read one family file; `HalfbyteError` names the file and the place when it is not valid."""
    try:
        return FamilyFile.model_validate(load_yaml(text))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        what = problem["msg"].removeprefix("Value error, ")
        raise HalfbyteError(f"the family file {name}.yaml is not valid: {key}: {what}") from None
    except ValueError as error:
        raise HalfbyteError(f"the family file {name}.yaml is not valid: {error}") from None


_ADDED: dict[str, str] = {}
"""YAML texts of plugins, by name."""


def add(text: str) -> FamilyFile:
    """Add a family, given as YAML; `HalfbyteError` where it is not valid or its name is taken."""
    data = parse(text, "of a plugin")
    if data.name in (*names(), "base"):
        raise HalfbyteError(f"there is a family {data.name!r} already; give the new one another name")
    if data.extends and data.extends not in (*names(), "base"):
        raise HalfbyteError(f"the family {data.name} extends {data.extends!r}, which does not exist")
    _ADDED[data.name] = text
    names.cache_clear()
    return read(data.name)


@cache
def read(name: str) -> FamilyFile:
    """The family file `name`, completed by everything that it extends."""
    path = resources.files("halfbyte.models") / "families" / f"{name}.yaml"
    data = parse(_ADDED[name] if name in _ADDED else path.read_text(encoding="utf-8"), name)
    return data.extended(read(data.extends)) if data.extends else data


@cache
def names() -> tuple[str, ...]:
    """All families but `base`, sorted."""
    folder = resources.files("halfbyte.models") / "families"
    files = (path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))
    return tuple(sorted({*files, *_ADDED} - {"base"}))
