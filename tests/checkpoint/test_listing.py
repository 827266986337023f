from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.checkpoint.listing import list_folder
from halfbyte.errors import CheckpointError


def test_files_of_the_folder_and_its_direct_folders_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").mkdir()
    for name in ("x.json", "a/y.json", "a/b/z.json", ".hidden", "a/.hidden"):
        (tmp_path / name).write_bytes(b"123")
    assert list_folder(tmp_path) == {"x.json": 3, "a/y.json": 3, "a/b/": None}


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "secret").write_bytes(b"1")
    (tmp_path / "m" / "x.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of the checkpoint's folder"):
        list_folder(tmp_path / "m")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be listed"):
        list_folder(tmp_path / "none")
