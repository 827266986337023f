"""What charts draw."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tests.report import documents
from tests.report.documents import write

from halfbyte.report import datasets, make_studies, read_inputs
from halfbyte.report.results_schema import Allocation, Sensitivity
from halfbyte.report.studies import Study


@pytest.fixture(scope="module")
def study() -> Study:
    """21 checkpoints as the benchmark measured them."""
    return make_studies(read_inputs([documents.REAL / "qwen3-tiny-wiki.json"]))[0]


def test_the_frontier_holds_what_nothing_smaller_beats(tmp_path: Path) -> None:
    (made,) = make_studies(read_inputs([write(tmp_path / "r.json", documents.results())]))
    assert {r["checkpoint"] for r in datasets.sizes(made) if r["frontier"]} == {"small", "large"}


def test_sizes_that_hardly_differ_are_one_on_the_frontier(tmp_path: Path) -> None:
    rows = [documents.row("base", 16_000, None), documents.row("a", 10_000, 0.02), documents.row("b", 10_001, 0.01)]
    (made,) = make_studies(read_inputs([write(tmp_path / "r.json", documents.results(*rows))]))
    assert {r["checkpoint"] for r in datasets.sizes(made) if r["frontier"]} == {"b"}


def test_the_source_is_no_point_of_a_chart(study: Study) -> None:
    shown = {r["checkpoint"] for r in [*datasets.sizes(study), *datasets.percentiles(study)]}
    assert shown == {row.label for row in study.quantized}


def test_the_map_of_errors_has_a_cell_per_layer_and_role(study: Study) -> None:
    row = next(row for row in study.rows if row.name == "mixfp4")
    assert row.errors is not None
    cells = {(r["layer"], r["role"]) for r in datasets.weights(study) if r["checkpoint"] == "mixfp4"}
    assert cells == {(str(w.layer), w.role) for w in row.errors.weights}


def test_shares_of_tables_add_up_in_every_cell(study: Study) -> None:
    sums: dict[tuple[str, ...], float] = {}
    for r in datasets.tables(study):
        key = (r["checkpoint"], r["role"], r["layer"])
        sums[key] = sums.get(key, 0.0) + r["share"]
    assert sums and all(math.isclose(total, 1, abs_tol=1e-6) for total in sums.values())
    assert {key[0] for key in sums} >= {"mixfp4", "if4"} and "nvfp4" not in {key[0] for key in sums}


def test_histograms_of_scales_are_shares_of_blocks(study: Study) -> None:
    found = [r for r in datasets.scales(study) if r["checkpoint"] == "nvfp4"]
    assert math.isclose(sum(r["share"] for r in found) + found[0]["zero"], 1, abs_tol=1e-6)
    assert all(r["scale"] < r["end"] <= 2 * r["scale"] for r in found)


def test_groups_are_ordered_and_lose_what_their_names_share() -> None:
    found = datasets.sensitivity(Sensitivity.model_validate(documents.sensitivity()))
    assert [(r["group"], r["name"]) for r in found] == [
        ("1.mlp", "model.layers.1.mlp"),
        ("0.mlp", "model.layers.0.mlp"),
    ]


def test_the_frontier_of_an_allocation_marks_what_was_chosen() -> None:
    found = datasets.frontier(Allocation.model_validate(documents.allocation()))
    assert [r["bytes"] for r in found if r["chosen"]] == [5_000]
