"""Statistics that somebody else made name files, and only in their own folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.calibration.statistics import DESCRIPTION_FILE, Statistics, merge, new_description, write_description
from halfbyte.errors import CheckpointError


@pytest.mark.parametrize(
    "name", ["../out", "/tmp/x", "a/b", "a\\b", "..", ".hidden", "", 3, None, "x" * 200, "nul\0", "-o", "C:x"]
)
def test_a_part_that_is_no_plain_name_is_refused(name: object, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        about = new_description(source={}, texts=[], samples=1, tokens=1, length=1, parts=[name], done=1) | {
            "complete": True
        }
        write_description(tmp_path / folder, about)
    with pytest.raises(CheckpointError, match="no plain name"):
        Statistics(tmp_path / "a")
    with pytest.raises(CheckpointError, match="no plain name"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/deep/er")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(("key", "value"), [("parts", "all"), ("parts", ["a", "a"]), ("tokens", "9"), ("texts", 1)])
def test_wrong_types_are_one_sentence(key: str, value: object, tmp_path: Path) -> None:
    about = new_description(source={}, texts=[], samples=1, tokens=1, length=1, parts=["a"], done=1) | {
        "complete": True
    }
    (tmp_path / DESCRIPTION_FILE).write_text(json.dumps({**about, key: value}))
    with pytest.raises(CheckpointError, match="damaged"):
        Statistics(tmp_path)
