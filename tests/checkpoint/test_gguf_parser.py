"""Headers of GGUF files, judged by the library gguf: the same metadata and tensors, or one error in bounded time."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.checkpoint.gguf_header import find_gguf, read_gguf
from halfbyte.checkpoint.gguf_parser import GGML_TYPES, GgufError, GgufFile, parse_gguf
from halfbyte.errors import CheckpointError

library = pytest.importorskip("gguf")

HUGE = (2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def content(pairs: list[bytes], infos: list[bytes], data: int = 0, **changed: int) -> bytes:
    counts = {"version": 3, "tensors": len(infos), "keys": len(pairs), **changed}
    head = b"GGUF" + struct.pack("<IQQ", counts["version"], counts["tensors"], counts["keys"])
    body = head + b"".join(pairs) + b"".join(infos)
    return body + bytes(-len(body) % 32 + data)


def written(path: Path) -> Path:
    """A file of the library with every type of metadata and every type of tensor."""
    writer = library.GGUFWriter(path, "qwen3")
    for kind, value in (("uint8", 200), ("int8", -3), ("uint16", 60000), ("int16", -300), ("uint32", 2**32 - 1)):
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    for kind, value in (("int32", -(2**31)), ("uint64", 2**64 - 1), ("int64", -(2**63))):
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "ä \U0001f600")
    writer.add_array("a.texts", ["", "x", "längere Wörter"])
    writer.add_array("a.floats", [0.5, float("inf")])
    writer.add_array("a.numbers", list(range(300)))
    writer.add_array("a.flags", [True, False])
    for number, (kind, block, size) in GGML_TYPES.items():
        if block > 1:
            raw = np.arange(6 * size, dtype=np.uint8).reshape(3, 2 * size)
            writer.add_tensor(f"t.{kind}", raw, raw_dtype=library.GGMLQuantizationType(number))
    writer.add_tensor("t.F32", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("t.F16", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def flat(value: Any) -> Iterator[Any]:
    """The library flattens arrays of arrays."""
    if isinstance(value, list):
        for item in value:
            yield from flat(item)
    else:
        yield value


def compare(found: GgufFile, path: Path) -> None:
    reader = library.GGUFReader(path)
    wanted = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(found.metadata) == list(wanted)
    for key, value in found.metadata.items():
        if isinstance(value, list):
            assert repr(list(flat(value))) == repr(wanted[key]), key
        else:
            assert repr(value) == repr(wanted[key]) and type(value) is type(wanted[key]), key
    assert len(found.tensors) == len(reader.tensors)
    for ours, theirs in zip(found.tensors, reader.tensors, strict=True):
        assert (ours.name, ours.kind, ours.offset, ours.nbytes) == (
            theirs.name,
            theirs.tensor_type.name,
            theirs.data_offset,
            theirs.n_bytes,
        )
        assert list(ours.shape) == [int(n) for n in reversed(theirs.shape)]


def test_the_table_of_types_is_the_librarys() -> None:
    assert {t.value: (t.name, *size) for t, size in library.GGML_QUANT_SIZES.items()} == GGML_TYPES


def test_metadata_and_tensors_are_those_that_the_library_reads(tmp_path: Path) -> None:
    path = written(tmp_path / "all.gguf")
    compare(parse_gguf(path), path)
    headers = read_gguf(tmp_path, ["all.gguf"])
    assert headers.tensors["t.Q4_0"].shape == (3, 36) and headers.tensors["t.Q4_0"].dtype == "U8"
    assert headers.tensors["t.F32"].shape == (2, 3) and headers.types["t.F16"] == "F16"


def test_nested_arrays_and_alignment_are_read(tmp_path: Path) -> None:
    inner = struct.pack("<IQ2i", 5, 2, -1, 7)
    nested = pair("n", 9, struct.pack("<IQ", 9, 2) + inner + inner)
    aligned = pair("general.alignment", 4, struct.pack("<I", 64))
    body = content([nested, aligned], [info("w", (2, 4))])
    path = tmp_path / "n.gguf"
    path.write_bytes(body + bytes(-len(body) % 64 + 32))
    found = parse_gguf(path)
    assert found.metadata["n"] == [[-1, 7], [-1, 7]] and found.tensors[0].offset % 64 == 0
    compare(found, path)


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("place", ["tensors", "keys", "key", "text", "array", "texts", "nested", "name", "dimension"])
def test_counts_and_lengths_beyond_the_file_end_at_once(tmp_path: Path, place: str, huge: int) -> None:
    count = struct.pack("<Q", huge)
    bodies = {
        "tensors": content([], [], tensors=huge),
        "keys": content([], [], keys=huge),
        "key": content([count + b"abc"], []),
        "text": content([text("a") + struct.pack("<I", 8) + count], []),
        "array": content([pair("a", 9, struct.pack("<I", 0) + count)], [], data=64),
        "texts": content([pair("a", 9, struct.pack("<I", 8) + count)], [], data=64),
        "nested": content([pair("a", 9, struct.pack("<IQI", 9, 1, 0) + count)], [], data=64),
        "name": content([], [count], data=64),
        "dimension": content([], [info("w", (huge, huge))], data=64),
    }
    path = tmp_path / "bad.gguf"
    path.write_bytes(bodies[place])
    began = time.process_time()
    with pytest.raises(GgufError, match=r"bad\.gguf") as caught:
        parse_gguf(path)
    assert time.process_time() - began < 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "does not begin with GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"NOPE" + bytes(40), "does not begin with GGUF"),
        (content([], [], version=1), "version is 1"),
        (content([], [], version=3 << 24), "big-endian"),
        (content([pair("a", 0, b"\1"), pair("a", 0, b"\1")], []), "'a' appears twice"),
        (content([pair("a", 77, b"")], [], 64), r"unknown type \(77\)"),
        (content([pair("a", 8, struct.pack("<Q", 1) + b"\xff")], []), "not UTF-8"),
        (content([pair("a", 9, struct.pack("<IQ", 9, 1) * 20)], [], 64), "nested deeply"),
        (content([pair("general.alignment", 4, struct.pack("<I", 3))], []), "power of two"),
        (content([pair("general.alignment", 8, text("32"))], []), "power of two"),
        (content([], [info("w", (2,)), info("w", (2,), offset=32)], 64), "'w' appears twice"),
        (content([], [info("w", (1,) * 5)], 64), "5 dimensions"),
        (content([], [info("w", (2,), 99)], 64), r"unknown type \(99\)"),
        (content([], [info("w", (2, 33), 2)], 640), "no whole Q4_0 blocks of 32"),
        (content([], [info("w", (2,), offset=8)], 64), "multiple of 32"),
        (content([], [info("w", (16,)), info("v", (16,), offset=32)], 128), "overlaps"),
        (content([], [info("w", (16,))], 32), "truncated"),
    ],
)
def test_a_wrong_header_is_refused_in_one_sentence(tmp_path: Path, body: bytes, problem: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(body)
    with pytest.raises(GgufError, match=problem) as caught:
        parse_gguf(path)
    assert "bad.gguf" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_changed_headers_are_read_as_the_library_reads_them_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    original = tmp_path / "all.gguf"
    if not original.exists():
        written(original)
    changed = bytearray(original.read_bytes())
    begin = min(tensor.offset for tensor in parse_gguf(original).tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, begin - 1))
        with_value = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(HUGE)))
        raw = bytes([with_value]) if with_value < 256 else struct.pack("<Q", with_value)
        changed[place : place + len(raw)] = raw
    path = tmp_path / "changed.gguf"
    path.write_bytes(changed[: data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))])
    began = time.process_time()
    try:
        found = parse_gguf(path)
    except CheckpointError as error:
        assert isinstance(error, GgufError) and "changed.gguf" in str(error)
    else:
        compare(found, path)
    assert time.process_time() - began < 2


def test_a_link_to_a_file_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "secret.gguf")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(tmp_path / "secret.gguf")
    with pytest.raises(CheckpointError, match="outside of the checkpoint's folder"):
        read_gguf(folder, find_gguf(folder, None))
