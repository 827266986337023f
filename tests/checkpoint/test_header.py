from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.checkpoint.header import MAX_HEADER_BYTES, read_header
from halfbyte.errors import CheckpointError

from .builders import entry, write_raw

A = entry("U8", [4], 0, 4)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path, path.name)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    return message


def test_tensors_come_by_offset_with_absolute_positions(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": entry("BF16", [2, 1], 4, 8), "a": A}
    path = write_raw(tmp_path / "x.safetensors", header, bytes(8))
    tensors, metadata, size = read_header(path, "x.safetensors")
    start = size - 8
    assert [(t.name, t.offset, t.nbytes) for t in tensors] == [("a", start, 4), ("b", start + 4, 4)]
    assert tensors[1].shape == (2, 1)
    assert metadata == {"format": "pt"}


def test_empty_tensors_may_share_an_offset(tmp_path: Path) -> None:
    header = {"a": A, "none": entry("F32", [0, 3], 0, 0), "last": entry("F32", [0], 4, 4)}
    tensors, _, _ = read_header(write_raw(tmp_path / "x.safetensors", header, bytes(4)), "x.safetensors")
    assert [t.name for t in tensors] == ["none", "a", "last"]


def test_a_scalar_has_an_empty_shape(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"s": entry("F32", [], 0, 4)}, bytes(4))
    assert read_header(path, "x.safetensors")[0][0].shape == ()


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (entry("F3", [4], 0, 4), "unknown dtype 'F3'"),
        (entry(["U8"], [4], 0, 4), "unknown dtype a list"),
        (entry("U8", 4, 0, 4), "not a list"),
        (entry("U8", [1] * 40, 0, 1), "not a list of at most"),
        (entry("U8", [4.0], 0, 4), "non-negative integer"),
        (entry("U8", [True], 0, 1), "non-negative integer"),
        (entry("U8", [-4], 0, 4), "non-negative integer"),
        (entry("U8", [[4]], 0, 4), "non-negative integer"),
        (entry("U8", [2**70], 0, 4), "too large"),
        (entry("U8", [2**32, 2**32], 0, 0), "too large"),
        (entry("U8", [0, 2**40, 2**40], 0, 0), "too large"),
        (entry("U8", [5], 0, 4), "does not fit the 4 bytes"),
        (entry("F32", [4], 0, 4), "does not fit the 4 bytes"),
        (entry("F4", [7], 0, 4), "does not fit the 4 bytes"),
        (entry("U8", [4], -4, 0), "impossible data_offsets"),
        (entry("U8", [4], 4, 0), "impossible data_offsets"),
        (entry("U8", [4], 0.0, 4), "impossible data_offsets"),
        (entry("U8", [4], None, 4), "impossible data_offsets"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 8]}, "two data_offsets"),
        ({"dtype": "U8", "shape": [4]}, "two data_offsets"),
        ({"shape": [4], "data_offsets": [0, 4]}, "must have a dtype"),
        ([], "must have a dtype"),
        (None, "must have a dtype"),
        ("text", "must have a dtype"),
    ],
)
def test_an_impossible_entry_is_refused_by_name(tmp_path: Path, tensor: object, says: str) -> None:
    message = refused(write_raw(tmp_path / "x.safetensors", {"layer.weight": tensor}, bytes(4)))
    assert says in message
    assert "layer.weight" in message


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = {"a": A, "b": entry("U8", [4], 2, 6)}
    assert "tensor b" in (message := refused(write_raw(tmp_path / "x.safetensors", header, bytes(6))))
    assert "overlaps" in message


def test_a_hole_between_tensors_is_refused(tmp_path: Path) -> None:
    header = {"a": A, "b": entry("U8", [4], 5, 9)}
    assert "tensor b" in (message := refused(write_raw(tmp_path / "x.safetensors", header, bytes(9))))
    assert "hole" in message


def test_data_that_does_not_start_behind_the_header_is_refused(tmp_path: Path) -> None:
    assert "hole" in refused(write_raw(tmp_path / "x.safetensors", {"a": entry("U8", [4], 2, 6)}, bytes(6)))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    message = refused(write_raw(tmp_path / "x.safetensors", {"a": A}, bytes(3)))
    assert "truncated" in message
    assert "tensor is a" in message


def test_a_file_longer_than_its_header_says_is_refused(tmp_path: Path) -> None:
    assert "longer" in refused(write_raw(tmp_path / "x.safetensors", {"a": A}, bytes(5)))


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_without_room_for_a_length_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert "too few" in refused(path)


@pytest.mark.parametrize("length", [100, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path, length: int) -> None:
    assert "header claims" in refused(write_raw(tmp_path / "x.safetensors", b"{}", length=length))


def test_a_header_above_the_limit_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", b"", length=MAX_HEADER_BYTES + 1)
    with path.open("r+b") as file:
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    assert "limit" in refused(path)


def test_a_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    assert "git lfs pull" in refused(path)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a":NaN}', "not valid JSON"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "not valid JSON"),
        (b'{"a":' + b"1" * 5000 + b"}", "JSON"),
        (b"[]", "JSON object"),
        (b'"a"', "JSON object"),
        (b'{"\xff":1}', "not UTF-8"),
        (json.dumps({}).encode("utf-16"), "not UTF-8"),
        (b'{"__metadata__":{"a":1}}', "text to text"),
        (b'{"__metadata__":[]}', "text to text"),
        (b'{"__metadata__":{"a":"\\ud800"}}', "surrogate"),
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "surrogate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_is_no_json_table_is_refused(tmp_path: Path, raw: bytes, says: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", raw)
    if b"1" * 5000 in raw:
        refused(path)  # interpreters without a limit on digits refuse the entry instead
    else:
        assert says in refused(path)


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(A).encode()
    message = refused(write_raw(tmp_path / "x.safetensors", b'{"a":' + one + b',"a":' + one + b"}", bytes(4)))
    assert "'a' appears twice" in message


def test_a_field_given_twice_is_refused(tmp_path: Path) -> None:
    raw = b'{"a":{"dtype":"U8","shape":[4],"shape":[2],"data_offsets":[0,4]}}'
    assert "'shape' appears twice" in refused(write_raw(tmp_path / "x.safetensors", raw, bytes(4)))


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    assert "not a regular file" in refused(tmp_path / "x.safetensors")
