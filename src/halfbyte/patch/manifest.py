"""What a patch says of itself: the files of both ends by SHA-256, and how each file of the target is made.

A patch is a safetensors file. Each of its tensors (U8) is a zstd stream; the manifest is in its metadata.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from halfbyte.checkpoint import Inventory
from halfbyte.checkpoint.folder import is_plain_path
from halfbyte.errors import CheckpointError

KEY = "halfbyte_patch"
SCHEMA = 1
_SHA256 = r"^[0-9a-f]{64}$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Region(_Strict):
    """A tensor of a target file: where it lies, and the base's tensor that its bytes are XORed with ("": none).

    ``stream``: the tensor of the patch; "" where the region equals that of the base.
    """

    name: str
    offset: int = Field(ge=0)
    nbytes: int = Field(ge=0)
    base: str = ""
    stream: str = ""


class Target(_Strict):
    """A file of the target: ``same`` as a file of the base, ``whole`` in the patch, or a header and ``regions``."""

    name: str
    sha256: str = Field(pattern=_SHA256)
    size: int = Field(ge=0)
    kind: Literal["same", "whole", "regions"]
    base: str = ""
    stream: str = ""
    header: int = Field(default=0, ge=0)
    regions: tuple[Region, ...] = ()

    @field_validator("name", "base")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        if name and not is_plain_path(name):
            raise ValueError(f"{name[:100]!r} is no plain path inside its folder")
        return name


class Manifest(_Strict):
    """Both ends of a patch; ``base``: SHA-256 of the base's files that are needed."""

    schema_: Literal[1] = Field(alias="schema")
    made_by: str
    base: dict[str, str]
    targets: tuple[Target, ...] = Field(min_length=1)

    @field_validator("base")
    @classmethod
    def _base_stays_inside(cls, base: dict[str, str]) -> dict[str, str]:
        for name in base:
            if not is_plain_path(name):
                raise ValueError(f"{name[:100]!r} is no plain path inside its folder")
        return base

    def to_text(self) -> str:
        """As JSON text."""
        return json.dumps(self.model_dump(by_alias=True, exclude_defaults=False), separators=(",", ":"))


def read_manifest(inventory: Inventory) -> Manifest:
    """The manifest of a patch; CheckpointError where the file is no patch, or a damaged one."""
    for file, metadata in inventory.metadata.items():
        if KEY in metadata:
            try:
                return Manifest.model_validate(_parsed(metadata[KEY], file))
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                raise CheckpointError(f"{file} is a damaged patch: {place}: {first['msg']}") from error
    raise CheckpointError(f"{inventory.source} is no patch; `halfbyte diff BASE TUNED -o FILE` makes one")


def _parsed(text: str, file: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is a damaged patch: its manifest is no JSON") from error
