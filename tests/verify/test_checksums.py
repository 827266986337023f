"""Outputs carry the SHA-256 of every file: each flipped bit is found, with the source or without it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.verify.weights import verify
from small_models import MOE_CONFIG, linear, moe_tensors, run, write_checkpoint

SETTINGS = [("nvfp4", "compressed-tensors"), ("nvfp4", "modelopt"), ("mxfp4", "halfbyte"), ("affine4_g64", "mlx")]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)


@pytest.mark.parametrize(("fmt", "dialect"), SETTINGS)
def test_a_flipped_bit_in_any_file_is_found_without_a_source(moe: Path, tmp_path: Path, fmt: str, dialect: str) -> None:
    out = tmp_path / "out"
    run(moe, out, linear(fmt), dialect)
    assert verify(out).ok
    draws = random.Random(7)
    for path in sorted(p for p in out.iterdir() if p.is_file()):
        intact = path.read_bytes()
        for _ in range(6):
            bit = draws.randrange(8 * len(intact))
            damaged = bytearray(intact)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert not _passes(out), f"bit {bit} of {path.name}"
        path.write_bytes(intact)
    assert verify(out).ok


def test_a_missing_file_is_found_without_a_source(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), "compressed-tensors")
    for path in sorted(p for p in (tmp_path / "out").iterdir() if p.is_file()):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "out", copy)
        (copy / path.name).unlink()
        assert not _passes(copy), path.name
        shutil.rmtree(copy)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        verify(tmp_path / "nowhere")


def _passes(out: Path) -> bool:
    try:
        return verify(out).ok
    except HalfbyteError:
        return False


def test_all_files_of_the_output_are_counted_and_those_of_the_user_are_named(moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(moe, out, linear("nvfp4"), "compressed-tensors")
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    (out / "notes.txt").write_text("of the user")
    found = verify(out).checksums
    assert found.files == len(sizes) and found.others == ["notes.txt"]
    assert found.bytes == sum(sizes.values()) - sizes["halfbyte.json"]


def test_a_file_name_that_no_file_system_has_is_a_problem(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), "compressed-tensors")
    path = tmp_path / "out" / "halfbyte.json"
    path.write_text(path.read_text().replace('"config.json": {', f'"{"a" * 300}": {{'))
    assert any("cannot be read" in problem for problem in verify(tmp_path / "out").problems)
