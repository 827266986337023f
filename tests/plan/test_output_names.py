"""No name of a stranger's file, recipe or folder leads out of the output, and all can be written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dialects.gguf_models import checkpoint
from halfbyte.errors import PlanError
from halfbyte.plan.build import make_plan
from halfbyte.plan.output_names import LONGEST, check_names
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, dense_tensors, linear, write_checkpoint


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a//x", "./x", "a\0b", "\udce9", "n" * (LONGEST + 1), ""])
def test_wrong_names_are_refused(name: str) -> None:
    refusal = check_names(["model.safetensors", name])
    assert refusal is not None
    refusal.reason.encode()


@pytest.mark.parametrize("name", ["model.safetensors", "a/b.json", "n" * LONGEST, "ä b.txt"])
def test_plain_names_are_not(name: str) -> None:
    assert check_names([name]) is None


@pytest.mark.parametrize("name", ["../../evil", "a/b", "/tmp/x", "a\nb", "\0"])
def test_the_name_of_a_recipe_stays_inside_of_the_output(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = Checkpoint.open(checkpoint(tmp_path / "m", "qwen3"))
    plan = make_plan(source, linear("mxfp4").model_copy(update={"name": name}), "gguf")
    (file,) = plan.file_bytes
    assert Path(file).name == file and file.isprintable()


def test_a_side_file_whose_name_is_too_long_is_found_by_the_plan(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, dense_tensors(), DENSE_CONFIG)
    (source / f"{'n' * 246}.json").write_text("{}")
    with pytest.raises(PlanError, match="has 251 bytes, and 247 can be written"):
        make_plan(Checkpoint.open(source), "nvfp4")


def test_everything_that_is_not_copied_is_counted_in_a_note(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, dense_tensors(), DENSE_CONFIG)
    for number in range(20):
        (source / f"{number:02}.bin").write_bytes(b"x")
    note = next(note for note in make_plan(Checkpoint.open(source), "nvfp4").notes if "not copied" in note)
    assert "11.bin and 8 more" in note


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have only UTF-8 names")
def test_a_folder_whose_name_is_no_utf8_can_be_planned(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    plan = make_plan(Checkpoint.open(write_checkpoint(folder, dense_tensors(), DENSE_CONFIG)), "nvfp4")
    assert rb"caf\\xe9" in plan.provenance
