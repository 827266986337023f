"""Results files: which are read, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.report import documents
from tests.report.documents import write

from halfbyte.report.read import ReportError, read_inputs, read_results


def test_real_results_of_every_model_are_read() -> None:
    found = read_inputs([documents.REAL])
    assert {document.source for document in found.results} == {path.stem for path in documents.REAL.glob("*.json")}


def test_a_folder_gives_its_documents_and_names_what_is_none(tmp_path: Path) -> None:
    write(tmp_path / "a.json", documents.results())
    other = write(tmp_path / "b.json", {"machine": "x"})
    found = read_inputs([tmp_path])
    assert (len(found.results), found.ignored) == (1, [other])


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", documents.results())
    assert len(read_inputs([path, tmp_path]).results) == 1


def test_sensitivity_is_read_from_lines_as_from_one_document(tmp_path: Path) -> None:
    whole = documents.sensitivity()
    head = {key: value for key, value in whole.items() if key != "groups"}
    lines = tmp_path / "s.jsonl"
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in [head, *whole["groups"]]))
    found = read_inputs([lines, write(tmp_path / "s.json", whole)])
    assert found.sensitivity[0] == found.sensitivity[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "is no results, errors, sensitivity or allocation file"),
        ('{"halfbyte": "other"}', "is no results"),
        ('{"halfbyte": ["results"]}', "is no results"),
        ('{"halfbyte": "results", "version": 2}', "version"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_what_is_no_results_file_is_refused_in_a_sentence(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ReportError, match=says):
        read_inputs([path])


def test_a_damaged_number_is_named_with_its_place(tmp_path: Path) -> None:
    damaged = documents.results()
    damaged["rows"][1]["kl"]["mean"] = "much"
    with pytest.raises(ReportError, match=r"rows\.1\.kl\.mean"):
        read_inputs([write(tmp_path / "bad.json", damaged)])


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    damaged = documents.results()
    damaged["rows"][1]["perplexity"] = float("nan")
    with pytest.raises(ReportError, match="finite"):
        read_inputs([write(tmp_path / "bad.json", damaged)])


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no results file"):
        read_inputs([tmp_path])


def test_a_card_wants_results_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is no results file"):
        read_results(write(tmp_path / "s.json", documents.sensitivity()))
