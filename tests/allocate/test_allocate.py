"""Formats chosen for a size: exact bytes, least loss, groups kept whole."""

from __future__ import annotations

import itertools
import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.allocate import AllocateOptions, allocate_recipe, smallest_recipe
from halfbyte.allocate.choices import AllocationUnit, Choice, make_units, measure, predict
from halfbyte.allocate.solve import allocate, frontier
from halfbyte.cli import main
from halfbyte.demo import MODEL
from halfbyte.dialects import get_dialect
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.plan.build import make_plan
from halfbyte.recipes import parse_recipe
from halfbyte.source.checkpoint import Checkpoint

pytest.importorskip("highspy")
HALFBYTE = get_dialect("halfbyte")
FORMATS = ("nvfp4", "mxfp4", "fp8_channel", "keep")


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return Checkpoint.open(MODEL)


@pytest.fixture(scope="module")
def units(demo: Checkpoint) -> list[AllocationUnit]:
    found = make_units(demo, HALFBYTE, FORMATS)
    measure(demo, found)
    predict(found)
    return found


costs = st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(costs, min_size=1, max_size=5), st.floats(0, 1))
def test_no_other_choice_within_the_budget_loses_less(table: list[list[tuple[int, float]]], where: float) -> None:
    given_units = [
        AllocationUnit(str(i), [], [Choice("f", b, 0, loss) for b, loss in some]) for i, some in enumerate(table)
    ]
    smallest, largest = (sum(f(b for b, _ in some) for some in table) for f in (min, max))
    budget = smallest + int(where * (largest - smallest))
    found = allocate(given_units, budget)
    assert found.bytes <= budget
    every = itertools.product(*table)
    best = min(sum(loss for _, loss in some) for some in every if sum(b for b, _ in some) <= budget)
    assert found.loss <= best * (1 + 1e-3) + 1e-6


def test_members_of_a_fusion_group_and_all_experts_of_a_layer_are_one_unit(units: list[AllocationUnit]) -> None:
    names = [[w.name.rpartition("layers.")[2] for w in unit.weights] for unit in units]
    assert any({"q_proj", "k_proj", "v_proj"} == {n.split(".")[-2] for n in some} for some in names)
    experts = [some for some in names if any(".experts." in n for n in some)]
    assert len(experts) == 4 and all(len(some) == 2 for some in experts)


def test_a_unit_s_bytes_are_those_that_the_plan_gives_it(demo: Checkpoint, units: list[AllocationUnit]) -> None:
    recipe = parse_recipe("rules: [{match: linear, format: nvfp4}]", "test", "t")
    by_name = {item.weight.name: item.nbytes for item in make_plan(demo, recipe, HALFBYTE).items}
    for unit in units:
        choice = next(c for c in unit.choices if c.format == "nvfp4")
        assert choice.bytes == sum(by_name[w.name] for w in unit.weights)


@pytest.mark.slow
def test_only_the_weights_of_the_units_are_quantized(demo: Checkpoint, units: list[AllocationUnit]) -> None:
    found = allocate_recipe(demo, HALFBYTE, AllocateOptions(bits=8.0, formats=FORMATS))
    chosen = {w.name: c.format for u, c in zip(found.units, found.allocation.chosen, strict=True) for w in u.weights}
    for item in found.plan.items:
        assert (item.format.name if item.format else "keep") == chosen.get(item.weight.name, "keep"), item.weight.name


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["halfbyte", "compressed-tensors"])
def test_the_output_has_at_most_the_budget_and_little_less(demo: Checkpoint, dialect: str) -> None:
    budget = 3_600_000
    found = allocate_recipe(demo, get_dialect(dialect), AllocateOptions(budget=budget, formats=FORMATS))
    assert found.plan.repository_bytes <= budget
    # what remains is smaller than the smallest step that another format would take
    assert budget - found.plan.repository_bytes < 120_000
    assert {c.format for c in found.allocation.chosen} > {"fp8_channel"}


@pytest.mark.slow
def test_bits_per_weight_are_kept(demo: Checkpoint) -> None:
    found = allocate_recipe(demo, HALFBYTE, AllocateOptions(bits=9.0, formats=FORMATS))
    assert 8.9 < found.plan.bits_per_weight <= 9.0


def test_more_bytes_never_predict_more_loss(units: list[AllocationUnit]) -> None:
    curve = frontier(units, 10)
    assert [a.bytes for a in curve] == sorted(a.bytes for a in curve)
    assert [a.loss for a in curve] == sorted((a.loss for a in curve), reverse=True)


def _sensitivity(path: Path, groups: dict[str, tuple[list[str], float]]) -> Path:
    lines = [{"halfbyte": "sensitivity", "version": 1}]
    lines += [{"group": g, "weights": w, "format": "nvfp4", "kl": {"mean": kl}} for g, (w, kl) in groups.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_sensitive_unit_gets_the_bytes(tmp_path: Path, demo: Checkpoint, units: list[AllocationUnit]) -> None:
    special = next(u for u in units if any(w.role == "linear_attention.out" for w in u.weights))
    groups = {u.name: ([w.name for w in u.weights], 1.0 if u is special else 1e-6) for u in units}
    groups["all"] = ([w.name for u in units for w in u.weights], 2.0)
    path = _sensitivity(tmp_path / "s.jsonl", groups)
    found = allocate_recipe(demo, HALFBYTE, AllocateOptions(bits=8.5, formats=FORMATS, sensitivity=path))
    chosen = {u.name: c.format for u, c in zip(found.units, found.allocation.chosen, strict=True)}
    assert chosen[special.name] == "keep"


def test_sensitivities_that_lack_a_unit_are_refused(
    tmp_path: Path, demo: Checkpoint, units: list[AllocationUnit]
) -> None:
    path = _sensitivity(tmp_path / "s.jsonl", {units[0].name: ([w.name for w in units[0].weights], 1.0)})
    with pytest.raises(CheckpointError, match="say nothing of"):
        allocate_recipe(demo, HALFBYTE, AllocateOptions(bits=8.5, formats=FORMATS, sensitivity=path))


def test_sensitivities_may_be_measured_in_a_format_that_is_no_choice(
    tmp_path: Path, demo: Checkpoint, units: list[AllocationUnit]
) -> None:
    path = _sensitivity(tmp_path / "s.jsonl", {u.name: ([w.name for w in u.weights], 1.0) for u in units})
    found = allocate_recipe(demo, HALFBYTE, AllocateOptions(bits=8.5, formats=("mxfp4", "keep"), sensitivity=path))
    assert {c.format for c in found.allocation.chosen} == {"mxfp4", "keep"}
    unit = found.units[0]
    mxfp4 = next(c for c in unit.choices if c.format == "mxfp4")
    assert mxfp4.loss == pytest.approx(unit.errors["mxfp4"] / unit.errors["nvfp4"])


def test_sensitivities_of_a_group_with_several_formats_are_refused(
    tmp_path: Path, demo: Checkpoint, units: list[AllocationUnit]
) -> None:
    path = _sensitivity(tmp_path / "s.jsonl", {u.name: ([w.name for w in u.weights], 1.0) for u in units})
    path.write_text(path.read_text().replace('"format": "nvfp4"', '"format": "mixed"'))
    with pytest.raises(CheckpointError, match="in several formats at once"):
        allocate_recipe(demo, HALFBYTE, AllocateOptions(bits=8.5, formats=FORMATS, sensitivity=path))


def test_a_budget_below_the_smallest_formats_is_refused_with_the_size_that_is_needed(demo: Checkpoint) -> None:
    with pytest.raises(PlanError, match=r"the smallest formats need \d+ bytes"):
        allocate_recipe(demo, HALFBYTE, AllocateOptions(bits=6.0, formats=FORMATS))


def test_a_budget_that_other_weights_use_up_is_refused(demo: Checkpoint) -> None:
    with pytest.raises(PlanError, match=r"other roles alone need \d+ bytes"):
        allocate_recipe(demo, HALFBYTE, AllocateOptions(bits=2.0, formats=FORMATS))


@pytest.mark.slow
def test_the_recipe_that_the_command_writes_quantizes_to_what_it_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    assert main(["allocate", str(MODEL), "--bits", "8", "-o", str(recipe), "--formats", *FORMATS, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert recipe.read_text().startswith("# Made by `halfbyte allocate` for demo_model")
    assert main(["quantize", str(MODEL), str(tmp_path / "out"), "--recipe", str(recipe), "--json"]) == 0
    capsys.readouterr()
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) == said["repository_bytes"]
    assert main(["verify", str(tmp_path / "out"), "--against", str(MODEL), "--json"]) == 0


@pytest.mark.slow
def test_without_a_text_the_command_says_what_its_prediction_rests_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    assert main(["allocate", str(MODEL), "--bits", "8", "-o", str(recipe), "--formats", *FORMATS]) == 0
    assert "place in the model" in (said := capsys.readouterr().out) and "--text FILE" in said
    assert "errors and the model's structure" in recipe.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.slow
def test_a_text_is_measured_on_and_another_size_uses_the_measurement_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    recipe, kept = tmp_path / "mine.yaml", tmp_path / "mine.sensitivity.jsonl"
    command = ["allocate", str(MODEL), "-o", str(recipe), "--formats", *FORMATS, "--text", str(MODEL / "heldout.txt")]
    command += ["--max-tokens", "130", "--length", "64"]
    assert main([*command, "--bits", "8"]) == 0
    assert str(kept) in capsys.readouterr().out
    groups = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
    assert {g["format"] for g in groups} == {"mxfp4"} and len(groups) == 21  # twenty units, and all together
    assert "measured sensitivities" in recipe.read_text()
    content = kept.read_bytes()
    # `halfbyte.evaluate` is a function as well as a package
    monkeypatch.delattr(import_module("halfbyte.evaluate.by_group"), "_Job")
    assert main([*command, "--bits", "9"]) == 0
    assert "at most 9.0 bits" in recipe.read_text() and kept.read_bytes() == content
    assert {p.name for p in tmp_path.iterdir()} == {"mine.yaml", "mine.sensitivity.jsonl", "cache"}


def test_nothing_is_measured_for_a_size_that_cannot_be_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["allocate", str(MODEL), "--bits", "6", "-o", str(tmp_path / "r.yaml"), "--text", "missing.txt"]
    assert main(command) == 2
    assert "the smallest formats need" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", "5"], "give --text as well"),
        (["--text", "a", "--sensitivity", "b"], "not allowed with"),
        (["--text", "missing.txt"], "missing.txt is no file"),
    ],
)
def test_wrong_options_for_measuring_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "missing.txt" in options:
        pytest.importorskip("transformers")
    try:
        code = main(["allocate", str(MODEL), "--bits", "8", "-o", str(tmp_path / "r.yaml"), *options])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    assert code != 0
    assert message in capsys.readouterr().err


def test_what_is_measured_is_each_unit_in_its_smallest_format(demo: Checkpoint) -> None:
    recipe = smallest_recipe(demo, FORMATS, ("linear", "lm_head"))
    found = {i.weight.name: i.format.name for i in make_plan(demo, recipe, HALFBYTE).items if i.format}
    names = {w.name for unit in make_units(demo, HALFBYTE, FORMATS, ("linear", "lm_head")) for w in unit.weights}
    assert found == dict.fromkeys(names, "mxfp4")


def test_what_no_text_reaches_cannot_be_measured(demo: Checkpoint) -> None:
    with pytest.raises(PlanError, match=r"^mtp\..* takes no part in reading a text"):
        smallest_recipe(demo, FORMATS, ("linear", "mtp"))


def test_tied_embeddings_that_are_stored_twice_are_one_unit(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tied = Checkpoint.open(folder)
    ends = ("embedding", "lm_head")
    assert [len(unit.weights) for unit in make_units(tied, HALFBYTE, FORMATS, ends)] == [2]
    # else the plan would refuse two formats
    allocate_recipe(tied, HALFBYTE, AllocateOptions(bits=15.3, formats=FORMATS, roles=ends))
