from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from halfbyte.checkpoint.shared_journal import RUN, SharedJournal, read_run
from halfbyte.errors import OutputError


def test_records_of_all_processes_count_while_their_files_have_the_size(tmp_path: Path) -> None:
    ours, theirs = SharedJournal(tmp_path, "f"), SharedJournal(tmp_path, "f")
    assert ours.attempt != theirs.attempt and not ours.continued and theirs.continued
    for name, journal in (("a", ours), ("b", theirs)):
        (tmp_path / name).write_bytes(b"123")
        journal.record(name, 3, {"sha256": name})
    (tmp_path / "b").write_bytes(b"12")
    ours.refresh()
    assert ours.done == {"a": {"nbytes": 3, "sha256": "a"}}


def test_many_that_begin_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: SharedJournal(tmp_path, "f", arguments={"i": i}), range(16)))
    assert read_run(tmp_path)["fingerprint"] == "f" and not list(tmp_path.rglob("*.partial"))


def test_the_first_record_of_a_file_stays(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    for i in range(2):
        SharedJournal(tmp_path, "f").record("a", 1, {"i": i})
    assert SharedJournal(tmp_path, "f").done["a"]["i"] == 0


def test_a_record_after_the_end_is_not_needed(tmp_path: Path) -> None:
    journal = SharedJournal(tmp_path, "f")
    SharedJournal(tmp_path, "f").finish()
    journal.record("a", 1)
    assert not (tmp_path / ".halfbyte").exists()


def test_another_plan_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    SharedJournal(tmp_path, "f", {"x": {"bytes": 1, "sample": "s"}})
    with pytest.raises(OutputError, match="another recipe"):
        SharedJournal(tmp_path, "g")
    with pytest.raises(OutputError, match="x of the source is not what the other workers"):
        SharedJournal(tmp_path, "f", {"x": {"bytes": 2, "sample": "s"}})
    (tmp_path / ".halfbyte" / RUN).write_bytes(b"{")
    with pytest.raises(OutputError, match="is damaged"):
        SharedJournal(tmp_path, "f")


def test_a_folder_without_workers_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no output that workers have begun; run `halfbyte quantize"):
        read_run(tmp_path)


def test_the_command_is_noted(tmp_path: Path) -> None:
    SharedJournal(tmp_path, "f", arguments={"recipe": "nvfp4"})
    assert json.loads((tmp_path / ".halfbyte" / RUN).read_text())["arguments"] == {"recipe": "nvfp4"}
