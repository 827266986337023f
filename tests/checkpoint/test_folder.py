from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from halfbyte.checkpoint.folder import scan
from halfbyte.checkpoint.store import LocalStore
from halfbyte.errors import CheckpointError

from .builders import write_floats, write_index


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 3)


def test_a_single_file_wins_over_other_safetensors(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors", "consolidated.safetensors", "adapter_model.safetensors")
    contents = scan(LocalStore(tmp_path))
    assert contents.weights == ["model.safetensors"]
    assert contents.ignored == ["adapter_model.safetensors", "consolidated.safetensors"]


def test_any_other_lone_file_is_the_checkpoint(tmp_path: Path) -> None:
    touch(tmp_path, "weights.safetensors")
    assert scan(LocalStore(tmp_path)).weights == ["weights.safetensors"]


def test_several_files_without_numbers_are_ambiguous(tmp_path: Path) -> None:
    touch(tmp_path, "a.safetensors", "b.safetensors")
    with pytest.raises(CheckpointError, match="name the file"):
        scan(LocalStore(tmp_path))


@pytest.mark.parametrize("numbers", [(1, 2), (0, 1), (0, 1, 2)], ids=["from 1", "from 0", "0 to N"])
def test_shards_without_an_index_are_all_taken(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    names = [f"model-{n:05d}-of-00002.safetensors" for n in numbers]
    touch(tmp_path, *names, "consolidated.safetensors")
    assert scan(LocalStore(tmp_path)).weights == names


def test_shards_may_lack_a_count(tmp_path: Path) -> None:
    touch(tmp_path, "model-00001.safetensors", "model-00002.safetensors")
    assert scan(LocalStore(tmp_path)).weights == ["model-00001.safetensors", "model-00002.safetensors"]


def test_a_missing_shard_is_noticed_without_an_index(tmp_path: Path) -> None:
    touch(tmp_path, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="shard 2 of 3 is missing"):
        scan(LocalStore(tmp_path))


def test_shards_of_two_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    touch(tmp_path, "model-00001-of-00001.safetensors", "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="several checkpoints"):
        scan(LocalStore(tmp_path))


def test_the_index_decides_which_files_are_read(tmp_path: Path) -> None:
    touch(tmp_path, "model-00000-of-00001.safetensors", "model-00001-of-00001.safetensors", "old.safetensors")
    write_index(tmp_path, {"b": "model-00001-of-00001.safetensors", "a": "model-00000-of-00001.safetensors"})
    contents = scan(LocalStore(tmp_path))
    assert contents.weights == ["model-00000-of-00001.safetensors", "model-00001-of-00001.safetensors"]
    assert contents.ignored == ["old.safetensors"]


def test_an_index_of_another_name_is_found(tmp_path: Path) -> None:
    touch(tmp_path, "consolidated-1.safetensors")
    index = {"weight_map": {"a": "consolidated-1.safetensors"}}
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    assert scan(LocalStore(tmp_path)).index == {"a": "consolidated-1.safetensors"}


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "", ".", "a\\x", "C:x", "a\0b", "./x"]
)
def test_an_index_cannot_name_files_outside_the_folder(tmp_path: Path, file: str) -> None:
    write_index(tmp_path, {"a": file})
    with pytest.raises(CheckpointError, match="no plain path inside its folder"):
        scan(LocalStore(tmp_path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "tensor a"),
        ('{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}', "'a' appears twice"),
        ('{"weight_map": {"\\ud800": "m.safetensors"}}', "surrogate"),
        ('{"weight_map": {"a": "\\ud800.safetensors"}}', "surrogate"),
        ("[]", "JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_damaged_index_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json") as caught:
        scan(LocalStore(tmp_path))
    assert says in str(caught.value)


def test_side_files_are_everything_else_down_to_one_level(tmp_path: Path) -> None:
    touch(
        tmp_path, "model.safetensors", "config.json", "tokenizer.json", "LICENSE", "chat/a.jinja", ".git/config",
        ".gitattributes", ".cache/x", ".halfbyte/journal.jsonl", "chat/.hidden",
    )  # fmt: skip
    assert scan(LocalStore(tmp_path)).side_files == {"LICENSE": 3, "chat/a.jinja": 3, "tokenizer.json": 3}


def test_other_weights_and_deep_folders_are_listed_as_ignored(tmp_path: Path) -> None:
    others = ["a.gguf", "b.pt", "original/c.pth", "onnx/model.safetensors", "pytorch_model.bin"]
    touch(tmp_path, "model.safetensors", *others, "pytorch_model.bin.index.json", "a/b/deep.txt")
    contents = scan(LocalStore(tmp_path))
    assert contents.side_files == {}
    assert sorted(contents.ignored) == sorted([*others, "pytorch_model.bin.index.json", "a/b/"])


def test_links_to_files_count_as_files(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "0"
    touch(tmp_path, "models--a--b/blobs/0", "models--a--b/snapshots/0/model.safetensors")
    (folder / "tokenizer.json").symlink_to("../../blobs/0")
    (folder / "same.json").symlink_to("tokenizer.json")
    assert scan(LocalStore(folder)).side_files == {"tokenizer.json": 3, "same.json": 3}


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "model.safetensors", "extra"])
def test_links_out_of_the_folder_are_refused_by_name(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "home/id_rsa", "blobs/0", "m/model-00001-of-00001.safetensors")
    target = tmp_path / "home" if name == "extra" else tmp_path / "home" / "id_rsa"
    for place in (target, Path("..") / target.relative_to(tmp_path)):
        (tmp_path / "m" / name).symlink_to(place)
        with pytest.raises(CheckpointError, match=rf"{name} is a link to .*outside of the checkpoint's folder"):
            scan(LocalStore(tmp_path / "m"))
        (tmp_path / "m" / name).unlink()


def test_a_link_to_weights_that_are_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to a file that is not there"):
        scan(LocalStore(tmp_path))


def test_only_what_belongs_to_a_checkpoint_travels(tmp_path: Path) -> None:
    side = [
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "LICENSE-2.0",
        "a/code.py",
        "README.md",
    ]
    others = ["onnx/model.onnx_data", "rust_model.ot", "model.pte", "weights.npz", "optimizer.tar", "training.log"]
    touch(tmp_path, "model.safetensors", *side, *others)
    contents = scan(LocalStore(tmp_path))
    assert sorted(contents.side_files) == sorted(side) and contents.ignored == sorted(others)


def test_a_dangling_link_is_not_dropped_silently(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors")
    (tmp_path / "tokenizer.json").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link"):
        scan(LocalStore(tmp_path))


def test_a_folder_of_pickled_weights_says_what_to_do(tmp_path: Path) -> None:
    touch(tmp_path, "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is in another format"):
        scan(LocalStore(tmp_path))


def test_a_named_file_brings_the_side_files_only_with_a_config(tmp_path: Path) -> None:
    write_floats(tmp_path / "x.safetensors", "a")
    touch(tmp_path, "holiday.jpg", "y.safetensors")
    assert scan(LocalStore(tmp_path), "x.safetensors").side_files == {}
    (tmp_path / "config.json").write_text("{}")
    contents = scan(LocalStore(tmp_path), "x.safetensors")
    assert (contents.weights, contents.ignored) == (["x.safetensors"], ["y.safetensors"])
    assert contents.side_files == {"holiday.jpg": 3}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_what_is_never_copied_is_named_with_its_kind(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors", "a/b/c/deep.json")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "other.safetensors").symlink_to("nothing")
    (tmp_path / "loop").symlink_to(".")
    with socket.socket(socket.AF_UNIX) as opened:
        before = Path.cwd()
        os.chdir(tmp_path)  # addresses are short
        try:
            opened.bind("socket.json")
        finally:
            os.chdir(before)
    assert sorted(scan(LocalStore(tmp_path)).ignored) == [
        "a/b/",
        "loop/ (a link to the folder itself)",
        "other.safetensors (a link to nothing)",
        "pipe.json (a pipe)",
        "socket.json (a socket)",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_weights_that_are_a_pipe_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors \(a pipe\)"):
        scan(LocalStore(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have only UTF-8 names")
@pytest.mark.parametrize("name", [b"caf\xe9.json", b"caf\xe9.safetensors"])
def test_a_name_that_is_no_utf8_is_refused_where_the_file_is_needed_and_named_where_not(
    name: bytes, tmp_path: Path
) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.bin")).write_bytes(b"x")
    if name.endswith(b".json"):
        touch(tmp_path, "model.safetensors")
        assert scan(LocalStore(tmp_path)).ignored == ["caf\\xe9.bin"]
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"caf\\xe9\.\w+ in .* is not UTF-8") as caught:
        scan(LocalStore(tmp_path))
    str(caught.value).encode()
