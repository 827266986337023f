from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from halfbyte.checkpoint import Inventory, build_header
from halfbyte.checkpoint import header as header_module
from halfbyte.errors import CheckpointError
from timing import within

from .builders import entry, write_floats, write_index, write_raw

SHARDS = ("model-00000-of-00001.safetensors", "model-00001-of-00001.safetensors")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_floats(tmp_path / SHARDS[0], "b", "a")
    write_floats(tmp_path / SHARDS[1], "c")
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}, total_size=48.0)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Inventory.open(folder)
    return str(caught.value)


def test_shards_are_one_inventory_in_file_order(sharded: Path) -> None:
    inventory = Inventory.open(sharded)
    assert [(t.name, t.file) for t in inventory.tensors.values()] == [
        ("b", SHARDS[0]),
        ("a", SHARDS[0]),
        ("c", SHARDS[1]),
    ]
    assert inventory.config == {"model_type": "x"}
    assert inventory.side_files == {"tokenizer.json": 2}
    assert inventory.side_file_bytes == 2
    assert inventory.total_bytes == 48
    assert inventory.files == {name: (sharded / name).stat().st_size for name in SHARDS}
    assert (inventory.root, inventory.source, inventory.revision) == (sharded, str(sharded), None)


def test_total_size_may_be_a_float(sharded: Path) -> None:
    assert Inventory.open(sharded).meta == {"total_size": 48.0}


def test_a_lone_file_needs_neither_config_nor_index(tmp_path: Path) -> None:
    inventory = Inventory.open(write_floats(tmp_path / "any.safetensors", "a"))
    assert list(inventory.tensors) == ["a"]
    assert inventory.config == {}


def test_only_headers_are_read(tmp_path: Path, monkeypatch) -> None:
    path = write_floats(tmp_path / "model.safetensors", "a", rows=1000)
    seen: list[int] = []
    original = header_module.read_into

    def spy(descriptor: int, view: memoryview, offset: int) -> int:
        seen.append(offset + len(view))
        return original(descriptor, view, offset)

    monkeypatch.setattr(header_module, "read_into", spy)
    Inventory.open(tmp_path)
    assert max(seen) == path.stat().st_size - 8000


def test_the_metadata_of_each_file_is_kept(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"__metadata__": {"a": "b"}, "t": entry("U8", [1], 0, 1)}, b"0")
    assert Inventory.open(tmp_path).metadata == {"model.safetensors": {"a": "b"}}


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    assert f"shard {SHARDS[1]} is named by the index but is missing" in refused(sharded)


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    with (sharded / SHARDS[1]).open("r+b") as file:
        file.truncate(os.path.getsize(sharded / SHARDS[1]) - 1)
    assert f"{SHARDS[1]} is truncated" in refused(sharded)


def test_of_a_tensor_in_two_shards_the_index_decides_which_one_counts(sharded: Path) -> None:
    write_floats(sharded / SHARDS[1], "c", "a")
    inventory = Inventory.open(sharded)
    assert inventory.tensors["a"].file == SHARDS[0]
    assert f"{SHARDS[1]}: a (the index takes the one in {SHARDS[0]})" in inventory.ignored_files


def test_a_tensor_in_two_shards_is_refused_without_an_index_too(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    write_floats(sharded / SHARDS[1], "a")
    assert "tensor a is in both" in refused(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[1]})
    assert f"tensor a is in {SHARDS[0]}, but the index places it in {SHARDS[1]}" in refused(sharded)


def test_a_tensor_that_only_the_index_knows_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], "d": SHARDS[1]})
    assert f"tensor d is not in {SHARDS[1]}" in refused(sharded)


def test_a_tensor_that_the_index_does_not_know_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "c": SHARDS[1]})
    assert f"tensor b in {SHARDS[0]} is not in the index" in refused(sharded)


def test_shards_may_be_links_to_the_blobs_of_the_hubs_cache(sharded: Path, tmp_path_factory) -> None:
    cache = tmp_path_factory.mktemp("models--a--b")
    (cache / "blobs").mkdir()
    (cache / "snapshots").mkdir()
    folder = sharded.rename(cache / "snapshots" / "0")
    (folder / SHARDS[1]).rename(cache / "blobs" / "0123")
    (folder / SHARDS[1]).symlink_to("../../blobs/0123")
    assert list(Inventory.open(folder).tensors) == ["b", "a", "c"]


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_damaged_config_is_refused_by_name(sharded: Path, text: str) -> None:
    (sharded / "config.json").write_text(text)
    assert "config.json" in refused(sharded)


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {})
    assert "holds no tensor" in refused(tmp_path)


def test_a_missing_path_is_refused() -> None:
    with pytest.raises(CheckpointError, match="does not exist here"):
        Inventory.open("no/such/folder")


def test_the_fingerprint_does_not_depend_on_the_place(sharded: Path, tmp_path_factory) -> None:
    first = Inventory.open(sharded).fingerprint
    moved = tmp_path_factory.mktemp("moved") / "m"
    sharded.rename(moved)
    assert Inventory.open(moved).fingerprint == first
    assert len(first) == 64


def test_the_fingerprint_sees_every_tensor_and_the_config(sharded: Path) -> None:
    prints = {Inventory.open(sharded).fingerprint}
    (sharded / "config.json").write_text('{"model_type": "y"}')
    prints.add(Inventory.open(sharded).fingerprint)
    write_floats(sharded / SHARDS[1], "c", rows=4)
    prints.add(Inventory.open(sharded).fingerprint)
    assert len(prints) == 3


def test_an_inventory_can_be_sent_to_another_process(sharded: Path) -> None:
    inventory = Inventory.open(sharded)
    assert pickle.loads(pickle.dumps(inventory)).tensors == inventory.tensors


@pytest.mark.slow
def test_125000_tensors_are_read_within_a_second_or_two(tmp_path: Path) -> None:
    names = [f"model.layers.{i // 2000}.mlp.experts.{i}.gate_proj.weight_packed" for i in range(125_000)]
    layout = build_header([(name, "U8", (1, i % 3)) for i, name in enumerate(names)])
    (tmp_path / "model.safetensors").write_bytes(layout.header + bytes(layout.total - len(layout.header)))
    inventory = within(2, lambda: Inventory.open(tmp_path))  # about 0.5 s when nothing else runs
    assert list(inventory.tensors) == sorted(names, key=lambda n: inventory.tensors[n].offset)
    assert len(inventory.tensors) == 125_000


def from_text(tmp_path: Path, value: object) -> Inventory:
    path = tmp_path / "x.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return Inventory.from_json(path)


def test_an_inventory_file_gives_consecutive_offsets_in_one_nameless_file(tmp_path: Path) -> None:
    tensors = {"a": ["BF16", [2, 3]], "b": ["F32", []]}
    inventory = from_text(tmp_path, {"config": {"x": 1}, "meta": {"side_file_bytes": 7}, "tensors": tensors})
    assert [(t.name, t.file, t.offset, t.nbytes) for t in inventory.tensors.values()] == [
        ("a", "", 0, 12),
        ("b", "", 12, 4),
    ]
    assert (inventory.root, inventory.config, inventory.side_file_bytes) == (None, {"x": 1}, 7)


def test_ranges_in_names_stand_for_all_combinations(tmp_path: Path) -> None:
    inventory = from_text(tmp_path, {"tensors": {"l{0..1}%.e{9..10}": ["U8", [1]]}})
    assert list(inventory.tensors) == ["l0%.e9", "l0%.e10", "l1%.e9", "l1%.e10"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "config, meta and tensors"),
        ({"tensors": []}, "config, meta and tensors"),
        ({"tensors": {}}, "holds no tensor"),
        ({"tensors": {"a": ["U8", [1]]}, "config": 1}, "config, meta and tensors"),
        ({"tensors": {"a": ["U8", [1]]}, "meta": {"side_file_bytes": -1}}, "side_file_bytes"),
        ({"tensors": {"\ud800": ["U8", [1]]}}, "surrogate"),
        ({"tensors": {"a": ["U8"]}}, "tensor a in x.json must be"),
        ({"tensors": {"a": [1, [1]]}}, "tensor a in x.json must be"),
        ({"tensors": {"a": None}}, "tensor a in x.json must be"),
        ({"tensors": {"a": ["U3", [1]]}}, "tensor a in x.json: unknown dtype"),
        ({"tensors": {"a": ["U8", [-1]]}}, "non-negative"),
        ({"tensors": {"a": ["U8", "1"]}}, "not a list"),
        ({"tensors": {"a{3..1}": ["U8", [1]]}}, "no name"),
        ({"tensors": {"a{0..9999999}{0..9999999}": ["U8", [1]]}}, "more than"),
        ({"tensors": {"a{1..2}": ["U8", [1]], "a2": ["U8", [1]]}}, "tensor a2 appears twice"),
        ('{"tensors": {"a": ["U8", [1]], "a": ["U8", [1]]}}', "'a' appears twice"),
    ],
)
def test_a_malformed_inventory_file_is_refused(tmp_path: Path, value: object, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_text(tmp_path, value)
    assert says in str(caught.value)
    assert "x.json" in str(caught.value)


def test_a_missing_inventory_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        Inventory.from_json(tmp_path / "none.json")


@pytest.mark.slow
def test_real_inventories_have_the_published_sizes(shared: Path) -> None:
    paths = sorted((shared / "inventories").glob("*.json"))
    assert len(paths) >= 5
    for path in paths:
        inventory = Inventory.from_json(path)
        assert inventory.total_bytes == inventory.meta["total_size"], path.name
        assert len(inventory.tensors) == inventory.meta.get("tensor_count", len(inventory.tensors))


@pytest.mark.slow
def test_kimi_with_208215_tensors_loads_fast(shared: Path) -> None:
    inventory = within(2, lambda: Inventory.from_json(shared / "inventories" / "kimi_k2_thinking.patterns.json"))
    assert len(inventory.tensors) == 208_215
    assert "model.layers.60.mlp.experts.383.down_proj.weight_packed" in inventory.tensors


@pytest.mark.parametrize("name", ["qwen3-tiny-wiki", "qwen35moe-tiny-wiki", "stories260K"])
def test_real_models_open_with_their_tokenizer_files(shared: Path, name: str) -> None:
    folder = shared / "data" / "models" / name
    inventory = Inventory.open(folder)
    expected = {p.name for p in folder.iterdir()} - {"config.json", "model.safetensors"}
    assert set(inventory.side_files) == expected
    assert inventory.config["architectures"]
    last = list(inventory.tensors.values())[-1]
    assert last.offset + last.nbytes == (folder / "model.safetensors").stat().st_size
