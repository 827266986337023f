"""Manifests of strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint import Inventory, build_header
from halfbyte.errors import CheckpointError
from halfbyte.patch.manifest import KEY, read_manifest


def opened(path: Path, text: str | None) -> Inventory:
    path.write_bytes(build_header([("s", "U8", (1,))], {} if text is None else {KEY: text}).header + b"x")
    return Inventory.open(path)


def test_a_file_without_a_manifest_is_no_patch(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no patch"):
        read_manifest(opened(tmp_path / "p.safetensors", None))


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "3",
        "{}",
        {"schema": 2, "made_by": "", "base": {}, "targets": []},
        {"schema": 1, "made_by": "", "base": {"../x": "0"}, "targets": [{}]},
        {"schema": 1, "made_by": "", "base": {}, "targets": [{"name": "a", "sha256": "?", "size": -1, "kind": "x"}]},
    ],
)
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(CheckpointError, match="damaged patch"):
        read_manifest(opened(tmp_path / "p.safetensors", text))
