"""What a source lacks is found by the plan, before any work."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from halfbyte.errors import CheckpointError
from halfbyte.plan.build import make_plan
from halfbyte.plan.source_check import check_readable
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, dense_tensors, write_checkpoint


@pytest.fixture
def source() -> Iterator[Path]:
    """A checkpoint that every user can reach, unlike what lies under tmp_path."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield write_checkpoint(folder / "m", dense_tensors(), DENSE_CONFIG)
    shutil.rmtree(folder)


@contextmanager
def without_privileges() -> Iterator[None]:
    """The superuser reads every file."""
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions of Unix")
@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_file_without_read_permission_is_found_by_the_plan(source: Path, name: str) -> None:
    (source / "tokenizer.json").write_text("{}")
    (source / name).chmod(0)
    with without_privileges(), pytest.raises(CheckpointError, match=rf"{name} cannot be read \(Permission denied\)"):
        make_plan(Checkpoint.open(source), "nvfp4")


def test_a_file_that_vanished_is_refused_and_an_inventory_has_none(tmp_path: Path) -> None:
    refusal = check_readable(tmp_path, ["gone.json"])
    assert refusal is not None and "gone.json cannot be read (No such file or directory)" in refusal.reason
    assert check_readable(None, ["gone.json"]) is None
