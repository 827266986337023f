"""Bad input: one clear sentence, and nothing left behind that looks complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from folded import plan_with
from halfbyte.convert import smoothing_search
from halfbyte.convert.conversion import convert
from halfbyte.errors import CheckpointError, HalfbyteError, OutputError, PlanError
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from matrix.sources import write
from small_models import (
    DENSE_CONFIG,
    MOE_CONFIG,
    dense_tensors,
    hashes,
    linear,
    moe_tensors,
    read_file,
    recipe,
    run,
    write_checkpoint,
    write_file,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG, shards=3)


def refused(source: Path, out: Path, error: type[HalfbyteError], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        run(source, out, linear("nvfp4"), max_shard_bytes=50_000)
    assert "\n" not in str(raised.value)
    assert not (out / "config.json").exists()
    assert not list(out.glob("*.partial")) and not list(out.glob("*.index.json"))


def shard(folder: Path, number: int = 2) -> Path:
    return folder / f"model-{number:05d}-of-00003.safetensors"


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def first_two(header: dict) -> tuple[dict, dict]:
    entries = [value for key, value in header.items() if key != "__metadata__"]
    return entries[0], entries[1]


def test_a_missing_shard_is_not_reported_as_success(source: Path, tmp_path: Path) -> None:
    shard(source).unlink()
    refused(source, tmp_path / "out", CheckpointError, "shard model-00002-of-00003.safetensors .* is missing")


def test_a_truncated_file(source: Path, tmp_path: Path) -> None:
    os.truncate(shard(source), shard(source).stat().st_size - 1)
    refused(source, tmp_path / "out", CheckpointError, "is truncated")


def test_a_file_that_is_cut_between_plan_and_conversion(source: Path, tmp_path: Path) -> None:
    plan = make_plan(Checkpoint.open(source), linear("nvfp4"))
    os.truncate(shard(source), 5000)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors changed after the plan was made"):
        convert(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_header_longer_than_the_file(source: Path, tmp_path: Path) -> None:
    data = shard(source).read_bytes()
    shard(source).write_bytes((10**9).to_bytes(8, "little") + data[8:])
    refused(source, tmp_path / "out", CheckpointError, "header claims 1000000000 bytes")


def test_offsets_that_overlap(source: Path, tmp_path: Path) -> None:
    def overlap(header: dict) -> None:
        a, b = first_two(header)
        size = b["data_offsets"][1] - b["data_offsets"][0]
        b["data_offsets"] = [a["data_offsets"][0], a["data_offsets"][0] + size]

    edit_header(shard(source), overlap)
    refused(source, tmp_path / "out", CheckpointError, "overlaps the tensor before it")


def test_negative_offsets(source: Path, tmp_path: Path) -> None:
    edit_header(shard(source), lambda header: first_two(header)[0].update(data_offsets=[-16, 0]))
    refused(source, tmp_path / "out", CheckpointError, "impossible data_offsets")


def test_a_shard_that_holds_the_tensors_of_another_one(source: Path, tmp_path: Path) -> None:
    shutil.copy(shard(source, 1), shard(source, 2))
    message = r"is not in model-00002-of-00003\.safetensors, where the index places it"
    refused(source, tmp_path / "out", CheckpointError, message)


def test_an_index_that_leads_out_of_the_folder(source: Path, tmp_path: Path) -> None:
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of", "../model-00002-of"))
    refused(source, tmp_path / "out", CheckpointError, "which is no plain path inside its folder")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_a_value_that_is_not_finite_in_a_quantized_or_a_kept_tensor(
    tmp_path: Path, name: str, value: float, dtype: type
) -> None:
    tensors = {key: array.astype(dtype) for key, array in dense_tensors().items()}
    tensors[name].reshape(-1)[77] = value
    source = write_checkpoint(tmp_path / "source", tensors, DENSE_CONFIG)
    refused(source, tmp_path / "out", CheckpointError, f"{name} holds a NaN")


def test_a_value_that_is_not_finite_in_a_kept_tensor_that_the_dialect_widens(tmp_path: Path) -> None:
    source, name = write(tmp_path / "source", "dense", 32), "model.norm.weight"
    tensors = read_file(source)
    tensors[name][7] = np.nan
    write_file(source / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"{name} holds a NaN"):
        run(source, tmp_path / "out", linear("q8_0"), "gguf")


def test_a_value_that_is_not_finite_in_a_kept_weight_that_is_smoothed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, name = moe_tensors(), "model.language_model.layers.0.mlp.shared_expert.gate_proj.weight"
    tensors[name][64, 77] = np.nan
    source = write_checkpoint(tmp_path / "source", tensors, MOE_CONFIG)
    # the scales are chosen on the first and last rows, which are sound
    monkeypatch.setattr(smoothing_search, "SAMPLE", 16 * 128)
    monkeypatch.setattr(smoothing_search, "_RUNS", 2)
    rules = (
        {"match": "linear", "format": "nvfp4", "transform": "awq"},
        {"match": r"re:layers\.0\.mlp\.shared_expert\.(gate|up)_proj", "keep": True},
    )
    with pytest.raises(CheckpointError, match=f"{name} holds a NaN"):
        convert(plan_with(source, recipe(*rules)), tmp_path / "out", threads=1)


def test_a_value_that_is_not_finite_in_one_expert(tmp_path: Path) -> None:
    tensors = moe_tensors(per_expert=True)
    tensors["model.language_model.layers.1.mlp.experts.3.up_proj.weight"][5, 5] = np.nan
    source = write_checkpoint(tmp_path / "source", tensors, MOE_CONFIG)
    refused(source, tmp_path / "out", CheckpointError, r"layers\.1\.mlp\.experts\.gate_up_proj holds a NaN")


def test_a_value_too_large_for_fp32(tmp_path: Path) -> None:
    tensors = {key: array.astype(np.float64) for key, array in dense_tensors().items()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e200
    source = write_checkpoint(tmp_path / "source", tensors, DENSE_CONFIG)
    refused(
        source, tmp_path / "out", CheckpointError, r"up_proj\.weight holds a NaN, an infinity or a value beyond FP32"
    )


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    tensors = moe_tensors(per_expert=True)
    del tensors["model.language_model.layers.1.mlp.experts.3.up_proj.weight"]
    source = write_checkpoint(tmp_path / "source", tensors, MOE_CONFIG)
    refused(source, tmp_path / "out", CheckpointError, r"incomplete, missing are .*experts\.3\.up_proj")


def test_an_output_folder_that_is_not_empty(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(source, tmp_path / "out", OutputError, "is not empty; choose another folder or empty it")
    assert hashes(tmp_path / "out").keys() == {"notes.txt"}


@pytest.mark.parametrize("inner", ["", "sub", "sub/deeper"])
def test_an_output_inside_the_input(source: Path, inner: str) -> None:
    before = hashes(source)
    with pytest.raises(OutputError, match="the input folder"):
        run(source, source / inner, linear("nvfp4"))
    assert hashes(source) == before


def test_an_output_that_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file; choose a folder"):
        run(source, tmp_path / "out", linear("nvfp4"))


def test_an_inventory_without_weights_can_be_planned_but_not_converted(shared: Path, tmp_path: Path) -> None:
    from halfbyte.checkpoint import Inventory

    inventory = Inventory.from_json(shared / "inventories" / "qwen3_0_6b.json")
    plan = make_plan(Checkpoint(inventory), "nvfp4")
    with pytest.raises(PlanError, match="is an inventory without weights; give the checkpoint itself"):
        convert(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 512 KiB; one that only seems to be where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)]
    if shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return

    def free() -> int:
        return 512 * 1024 - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def allocate(descriptor: int, offset: int, size: int) -> None:
        if size > free():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(descriptor, size)

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free()))
    monkeypatch.setattr(os, "posix_fallocate", allocate, raising=False)
    yield folder


def test_a_disk_that_is_too_small_is_found_before_the_work(source: Path, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(400 * 1024))
    refused(source, small_disk / "out", OutputError, r"needs \d+ more bytes, but the disk has \d+ free")


def test_a_disk_that_fills_up_on_the_way(source: Path, small_disk: Path) -> None:
    plan = make_plan(Checkpoint.open(source), linear("nvfp4"), max_shard_bytes=50_000)
    seen: list[int] = []

    def fill(_: int) -> None:
        if not seen:
            # files are reserved in full when they are begun, so this is what the later ones would need; the next one
            # may be begun meanwhile
            with open(small_disk / "other", "wb", buffering=0) as other, contextlib.suppress(OSError):
                while (room := shutil.disk_usage(small_disk).free - 20_000) > 0:
                    other.write(bytes(min(room, 4096)))
        seen.append(1)

    with pytest.raises(OutputError, match="the disk has no room for"):
        convert(plan, small_disk / "out", threads=1, progress=fill)
    assert not (small_disk / "out" / "config.json").exists()
    (small_disk / "other").unlink()
    convert(plan, small_disk / "out", threads=1)  # with room again, it continues
    assert (small_disk / "out" / "config.json").exists()


def test_a_limit_on_file_sizes_is_an_error_too(source: Path, tmp_path: Path) -> None:
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from halfbyte.convert.conversion import convert\nfrom halfbyte.errors import OutputError\n"
        "from halfbyte.plan.build import make_plan\nfrom halfbyte.source.checkpoint import Checkpoint\n"
        "try: convert(make_plan(Checkpoint.open(sys.argv[1]), 'nvfp4-absmax'), sys.argv[2], threads=1)\n"
        "except OutputError as error: print(error)\n"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "cannot be written (File too large)" in done.stdout and done.stderr == ""
    assert not (tmp_path / "out" / "config.json").exists()
