from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from halfbyte.errors import CheckpointError
from halfbyte.stores.open_source import open_inventory
from small_models import DENSE_CONFIG, dense_tensors, write_checkpoint

from .hub_server import COMMIT, FakeHub, HubFile, of_folder, served


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    folder = write_checkpoint(tmp_path / "source" / "tiny", dense_tensors(), DENSE_CONFIG)
    with served(of_folder("acme/tiny", folder), monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.mark.parametrize(
    ("source", "revision"),
    [("acme/tiny", None), ("hf://acme/tiny", None), ("hf://acme/tiny@main", None), ("hf://acme/tiny", COMMIT)],
)
def test_all_spellings_of_a_hub_id_are_one_source_that_is_not_downloaded(
    hub: FakeHub, tmp_path: Path, source: str, revision: str | None
) -> None:
    inventory = open_inventory(source, revision)
    assert inventory.remote is not None and (inventory.source, inventory.revision) == ("acme/tiny", COMMIT)
    assert not list((tmp_path / "cache").rglob("*"))


def test_two_revisions_are_refused(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="leave one out"):
        open_inventory("hf://acme/tiny@main", "v1")


@pytest.mark.parametrize("source", ["ftp://acme/tiny", "hf://acme", "hf://acme/tiny/deeper"])
def test_other_addresses_are_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="no source that can be read"):
        open_inventory(source)


def test_what_the_cache_holds_is_read_from_there(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cache" / "models--acme--tiny"
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for name, file in hub.files.items():
        (root / "snapshots" / COMMIT / name).write_bytes(file.content(0, file.size))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = open_inventory("acme/tiny")
    assert offline.root == root / "snapshots" / COMMIT


def sparse_hub(shared: Path) -> FakeHub:
    """Qwen3.6-35B-A3B: real names and shapes in 26 files, weights of zeros, 23 MB of tokenizer."""
    table = json.loads((shared / "inventories" / "qwen36_35b_a3b.json").read_text())
    sizes = {name: 2 * _product(shape) for name, (_, shape) in table["tensors"].items()}
    per_file = sum(sizes.values()) // 26 + 1
    shards: list[dict[str, object]] = [{}]
    filled = 0
    for name, (dtype, shape) in table["tensors"].items():
        size = sizes[name] * (2 if dtype == "F32" else 1)
        if filled and filled + size > per_file:
            shards.append({})
            filled = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [filled, filled + size]}
        filled += size
    files, weight_map = {}, {}
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = json.dumps(entries).encode()
        start = len(header).to_bytes(8, "little") + header
        size = len(start) + max(entry["data_offsets"][1] for entry in entries.values())  # type: ignore[index]
        weight_map |= dict.fromkeys(entries, file)

        def content(offset: int, count: int, start: bytes = start) -> bytes:
            return start[offset : offset + count].ljust(count, b"\0")

        files[file] = HubFile(size, content, True, f"{number:064x}")
    files["config.json"] = HubFile.of(json.dumps(table["config"]).encode(), False)
    files["model.safetensors.index.json"] = HubFile.of(json.dumps({"weight_map": weight_map}).encode(), False)
    files["tokenizer.json"] = HubFile.of(bytes(23 << 20), True)
    return FakeHub("Qwen/Qwen3.6-35B-A3B", files)


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def test_a_plan_of_35b_parameters_reads_headers_alone(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(sparse_hub(shared), monkeypatch, tmp_path / "cache") as hub:
        program = (
            "import sys, time; from halfbyte.cli import main; code = main(sys.argv[1:]); "
            "print(time.process_time(), file=sys.stderr); sys.exit(code)"
        )
        ran = subprocess.run(
            [sys.executable, "-c", program, "plan", "Qwen/Qwen3.6-35B-A3B", "--recipe", "nvfp4", "--json"],
            env={
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(tmp_path / "home"),
                "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            },
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        document = json.loads(ran.stdout)
        assert document["source"] == "Qwen/Qwen3.6-35B-A3B" and document["tensors"] > 1000
        assert hub.bytes < 3_000_000
        assert float(ran.stderr.split()[-1]) < 6.0  # CPU seconds, also on a slow machine
        print(hub.bytes, dict(hub.counts), ran.stderr)
