"""Which results belong together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tests.report import documents
from tests.report.documents import write

from halfbyte.report import make_studies, read_inputs
from halfbyte.report.studies import Study


def studies(folder: Path, *found: dict[str, Any]) -> list[Study]:
    return make_studies(read_inputs([write(folder / f"{i}.json", document) for i, document in enumerate(found)]))


def test_tasks_and_divergences_of_the_same_checkpoints_share_rows(tmp_path: Path) -> None:
    first = documents.results()
    (study,) = studies(tmp_path, first, documents.only_tasks(first))
    assert [row.name for row in study.rows] == ["base", "small", "middle", "large"]
    assert all(row.tasks["mmlu_pro"].value == 0.5 and row.perplexity == 20.0 for row in study.rows)
    assert study.source is study.rows[0]


def test_the_order_of_files_does_not_matter_for_what_a_row_holds(tmp_path: Path) -> None:
    first = documents.results()
    (study,) = studies(tmp_path, documents.only_tasks(first), first)
    assert study.rows[1].kl is not None and study.rows[1].tasks


def test_other_protocols_make_another_study(tmp_path: Path) -> None:
    first, second = documents.results(), documents.results()
    for row in second["rows"]:
        row["protocol"] = row["kl_protocol"] = documents.protocol("c" * 64)
    assert len(studies(tmp_path, first, second)) == 2


def test_other_sources_make_another_study(tmp_path: Path) -> None:
    second = documents.results(documents.row("other", 9, None), documents.row("small", 4, 0.1))
    second["source"] = "other"
    assert [study.name for study in studies(tmp_path, documents.results(), second)] == ["base", "other"]


def test_two_measurements_that_contradict_each_other_stay_apart(tmp_path: Path) -> None:
    second = copy.deepcopy(documents.results())
    second["rows"][1]["kl"] = documents.divergence(0.5)
    assert len(studies(tmp_path, documents.results(), second)) == 2


def test_rounded_activations_are_a_row_of_their_own(tmp_path: Path) -> None:
    second = documents.results(
        documents.row("base", 16_000, None), documents.row("small", 4_000, 0.09, activations="fp8")
    )
    (study,) = studies(tmp_path, documents.results(), second)
    assert [row.label for row in study.rows][-1] == "small + fp8 activations"


def test_checkpoints_of_one_name_are_told_apart_also_where_they_are_spoken_of(tmp_path: Path) -> None:
    other = documents.row("small", 5_000, 0.05, fingerprint="e" * 64)
    last = documents.row("last", 6_000, 0.06, indistinguishable={"kl": ["small"], "perplexity": [], "noise": False})
    second = documents.results(documents.row("base", 16_000, None), other, last)
    (study,) = studies(tmp_path, documents.results(), second)
    assert [row.name for row in study.rows] == ["base", "small", "middle", "large", "small (eeeeeeee)", "last"]
    assert study.rows[-1].indistinguishable.kl == ("small (eeeeeeee)",)


def test_errors_of_a_file_of_their_own_go_to_their_row(tmp_path: Path) -> None:
    errors = documents.real()["rows"][1]["errors"] | {"out": "./somewhere/small", "against": "base"}
    (study,) = studies(tmp_path, documents.results(), errors)
    assert study.rows[1].errors is not None and study.rows[2].errors is None


def test_sensitivity_goes_to_its_model(tmp_path: Path) -> None:
    (study,) = studies(tmp_path, documents.results(), documents.sensitivity("./models/base"))
    assert len(study.sensitivity) == 1


def test_an_allocation_of_no_known_recipe_stands_alone_among_many(tmp_path: Path) -> None:
    second = documents.results(documents.row("other", 9, None), documents.row("tiny", 4, 0.1))
    second["source"] = "other"
    found = studies(tmp_path, documents.results(), second, documents.allocation("mine"))
    assert [(study.name, len(study.allocations)) for study in found] == [("base", 0), ("other", 0), ("mine", 1)]
