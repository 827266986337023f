from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from halfbyte.checkpoint import Journal, prepare_output
from halfbyte.errors import OutputError


def finished(journal: Journal, name: str, data: bytes = b"123", **extra: object) -> None:
    (journal.folder / name).write_bytes(data)
    journal.record(name, len(data), extra)


def test_recorded_files_are_done_in_the_next_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "f")
    finished(journal, "a", sha="0")
    finished(journal, "b", b"")
    expected = {"a": {"nbytes": 3, "sha": "0"}, "b": {"nbytes": 0}}
    assert journal.done == expected
    assert Journal(tmp_path, "f").done == expected


def test_a_file_that_is_missing_is_not_done(tmp_path: Path) -> None:
    finished(Journal(tmp_path, "f"), "a")
    (tmp_path / "a").unlink()
    assert Journal(tmp_path, "f").done == {}


def test_a_file_of_another_size_is_not_done(tmp_path: Path) -> None:
    finished(Journal(tmp_path, "f"), "a")
    (tmp_path / "a").write_bytes(b"12")
    assert Journal(tmp_path, "f").done == {}


def test_the_latest_record_of_a_file_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "f")
    finished(journal, "a", b"1", run=1)
    finished(journal, "a", b"12", run=2)
    assert Journal(tmp_path, "f").done == {"a": {"nbytes": 2, "run": 2}}


@pytest.mark.parametrize("lost", [1, 2, 10, 30])
def test_a_torn_last_line_is_ignored_and_does_not_spoil_the_next(tmp_path: Path, lost: int) -> None:
    journal = Journal(tmp_path, "f")
    finished(journal, "a")
    finished(journal, "b")
    journal.path.write_bytes(journal.path.read_bytes()[:-lost])
    again = Journal(tmp_path, "f")
    assert set(again.done) - {"b"} == {"a"}
    finished(again, "c")
    assert {"a", "c"} <= set(Journal(tmp_path, "f").done)


@pytest.mark.parametrize("line", ["[]", "{}", '{"file": 1, "nbytes": 3, "extra": {}}', "\0\0\0", "é"])
def test_lines_that_are_no_records_are_skipped(tmp_path: Path, line: str) -> None:
    journal = Journal(tmp_path, "f")
    with journal.path.open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    finished(journal, "a")
    assert set(Journal(tmp_path, "f").done) == {"a"}


def test_a_journal_of_another_conversion_is_refused_with_its_folder(tmp_path: Path) -> None:
    Journal(tmp_path, "f")
    with pytest.raises(OutputError, match="choose another folder or remove") as caught:
        Journal(tmp_path, "g")
    assert str(tmp_path) in str(caught.value)


def test_refresh_shows_what_others_have_finished(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, "f"), Journal(tmp_path, "f")
    finished(second, "a")
    assert first.done == {}
    first.refresh()
    assert set(first.done) == {"a"}


def test_finish_removes_the_journal_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "f")
    finished(journal, "a")
    journal.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_removed_journal_is_not_started_again_in_the_middle(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "f")
    journal.finish()
    with pytest.raises(OutputError, match="cannot be written"):
        journal.record("a", 3)


def test_a_new_output_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    journal = prepare_output(tmp_path / "a" / "b", None, "f")
    assert journal.path.is_file()
    assert journal.done == {}


def test_an_empty_folder_is_accepted(tmp_path: Path) -> None:
    assert prepare_output(tmp_path, None, "f").folder == tmp_path


def test_an_interrupted_conversion_continues(tmp_path: Path) -> None:
    finished(prepare_output(tmp_path / "out", None, "f"), "a")
    assert set(prepare_output(tmp_path / "out", None, "f").done) == {"a"}


def test_a_run_killed_before_its_first_line_can_start_again(tmp_path: Path) -> None:
    (tmp_path / ".halfbyte").mkdir()
    (tmp_path / ".halfbyte" / "journal.jsonl.partial").write_bytes(b"{")
    assert prepare_output(tmp_path, None, "f").done == {}


def test_the_output_of_another_conversion_is_refused(tmp_path: Path) -> None:
    prepare_output(tmp_path / "out", None, "f")
    with pytest.raises(OutputError, match="another conversion"):
        prepare_output(tmp_path / "out", None, "g")


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        prepare_output(tmp_path, None, "f")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_finished_output_is_not_overwritten(tmp_path: Path) -> None:
    journal = prepare_output(tmp_path / "out", None, "f")
    finished(journal, "a")
    journal.finish()
    with pytest.raises(OutputError, match="not empty"):
        prepare_output(tmp_path / "out", None, "f")


@pytest.mark.parametrize("inner", [".", "out", "a/b", "a/../out", "link/out"])
def test_an_output_in_the_input_is_refused(tmp_path: Path, inner: str) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "link").symlink_to(source)
    with pytest.raises(OutputError, match="input folder"):
        prepare_output(source / inner, source, "f")
    assert [p.name for p in source.iterdir()] == ["link"]


def test_links_cannot_hide_that_the_output_is_in_the_input(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "alias").symlink_to("model")
    with pytest.raises(OutputError, match="inside the input folder"):
        prepare_output(tmp_path / "alias" / "out", tmp_path / "model", "f")
    with pytest.raises(OutputError, match="the input folder itself"):
        prepare_output(tmp_path / "model", tmp_path / "alias", "f")


def test_an_output_beside_the_input_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert prepare_output(tmp_path / "model-int4", tmp_path / "model", "f").done == {}


@pytest.mark.parametrize("inner", ["x", "x/out"])
def test_a_file_in_the_way_is_refused(tmp_path: Path, inner: str) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match=r"is a file|cannot be used"):
        prepare_output(tmp_path / inner, None, "f")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "loop"])
def test_an_impossible_output_path_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match="cannot be used"):
        prepare_output(tmp_path / name, None, "f")


def test_processes_that_start_together_share_one_journal(tmp_path: Path) -> None:
    journals: list[Journal] = []
    with ThreadPoolExecutor(8) as pool:
        journals = list(pool.map(lambda _: prepare_output(tmp_path / "out", None, "f"), range(16)))
    for i, journal in enumerate(journals):
        finished(journal, f"{i}")
    assert len(Journal(tmp_path / "out", "f").done) == 16
    assert [p.name for p in (tmp_path / "out" / ".halfbyte").iterdir()] == ["journal.jsonl"]


def test_a_journal_starts_where_hard_links_are_missing(tmp_path: Path, monkeypatch) -> None:
    def unsupported(*_args: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", unsupported)
    finished(Journal(tmp_path, "f"), "a")
    assert set(Journal(tmp_path, "f").done) == {"a"}
