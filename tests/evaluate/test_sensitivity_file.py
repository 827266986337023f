"""One reader of sensitivity files, for runs that continue, for allocations and for reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.report import documents

from halfbyte.allocate.choices import measured_groups
from halfbyte.errors import OutputError
from halfbyte.evaluate.sensitivity_file import read_sensitivity
from halfbyte.report.read import read_inputs


@pytest.fixture
def lines() -> list[str]:
    document = documents.sensitivity()
    groups = document.pop("groups")
    return [json.dumps(line) for line in (document, *groups)]


def test_the_beginning_that_an_interrupted_run_leaves_is_read_by_all(lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join([lines[0], lines[1], lines[2][:40]]))
    content = read_sensitivity(path)
    assert [group["group"] for group in content["groups"]] == ["model.layers.0.mlp"] and not content["complete"]
    assert [sorted(group.weights) for group in measured_groups(path)] == [["model.layers.0.mlp"]]
    assert len(read_inputs([path]).sensitivity[0].groups) == 1


def test_a_run_that_went_on_after_a_torn_line_is_complete(lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join([lines[0], lines[1], lines[2][:40], lines[2], lines[3]]) + "\n")
    content = read_sensitivity(path)
    assert len(content["groups"]) == 3 and content["complete"] and len(measured_groups(path)) == 2


@pytest.mark.parametrize("mean", ["NaN", "Infinity", "null", '"x"'])
def test_a_divergence_that_is_no_finite_number_is_refused(mean: str, lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join([lines[0], lines[1].replace('"mean": 0.001', f'"mean": {mean}')]) + "\n")
    with pytest.raises(OutputError, match="line 2"):
        read_sensitivity(path)
