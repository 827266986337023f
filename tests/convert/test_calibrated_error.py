"""The error weighted by activations is that of a direct computation, and is shown wherever calibrated weights are."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from halfbyte.checkpoint import Reader
from halfbyte.cli import main
from halfbyte.convert.conversion import Conversion, convert
from halfbyte.demo import MODEL
from halfbyte.evaluate import tensor_errors
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.sealed_provenance import calibrated_errors
from halfbyte.plan.smoothing_use import stored_smoothings
from halfbyte.recipes import parse_recipe
from halfbyte.source.checkpoint import Checkpoint
from invented import invented_statistics
from small_models import linear

RULES = {
    "gptq": "format: nvfp4, rounding: gptq",
    "local_hessian": "format: nvfp4, objective: local_hessian",
    "importance": "format: nvfp4",
    "hadamard": "format: mxfp4, transform: hadamard, rounding: gptq",
    "duquant": "format: mxfp4, transform: duquant, rounding: gptq",
    "awq": "format: mxfp4, transform: awq, rounding: gptq",
}


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return invented_statistics(tmp_path_factory.mktemp("s") / "statistics")


def plan_of(rule: str, statistics: Path | None, match: str = "[attention.o, experts.down]") -> Plan:
    recipe = parse_recipe(f"rules: [{{match: {match}, {rule}}}]", "t", "t")
    return halfbyte.plan(MODEL, recipe, importance=statistics)


def converted(rule: str, statistics: Path | None, out: Path, **more: Any) -> tuple[Plan, Conversion]:
    plan = plan_of(rule, statistics)
    return plan, convert(plan, out, **more)


def direct(plan: Plan, out: Path, name: str, hessians: bool) -> tuple[float, float]:
    """tr(E H E^T) and tr(W H W^T) of a weight, over the experts that have a Hessian."""
    assert plan.calibration_use is not None
    known, starved = plan.calibration_use.calibration, plan.calibration_use.starved.get(name, [])
    source, ours = plan.checkpoint, Checkpoint.open(out)
    weight = next(w for w in source.weights if w.name == name)
    with Reader(source.inventory) as reader, Reader(ours.inventory) as written:
        before = source.read(reader, weight, 0, weight.shape[0]).astype(np.float64)
        after = ours.read(written, weight, 0, weight.shape[0]).astype(np.float64)
        fold = stored_smoothings(out, source, reader).get(name)
    if fold is not None and fold.columns is not None:  # back to the weight as its inputs meet it
        after = after / fold.columns[..., None, :] if fold.columns.ndim > 1 else after / fold.columns
    error = squares = 0.0
    for expert in range(len(before)) if before.ndim > 2 else [None]:
        if hessians and expert in starved:
            continue
        w, e = (a if expert is None else a[expert] for a in (before, after - before))
        values = known.matched.values[name]
        hessian = known.hessian(name, expert) if hessians else np.diag(values if values.ndim == 1 else values[expert])
        error += float(np.trace(e @ hessian.astype(np.float64) @ e.T))
        squares += float(np.trace(w @ hessian.astype(np.float64) @ w.T))
    return error, squares


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
def test_the_error_is_that_of_a_direct_computation(kind: str, statistics: Path, tmp_path: Path) -> None:
    plan, done = converted(RULES[kind], statistics, tmp_path / "out")
    assert any(error.calibrated_squares for error in done.errors)
    for error in done.errors:
        wanted = direct(plan, tmp_path / "out", error.name, hessians=kind != "importance")
        assert (error.calibrated_error, error.calibrated_squares) == pytest.approx(wanted, rel=1e-4)


def test_rounding_by_hessians_lowers_this_error_and_raises_the_plain_one(statistics: Path, tmp_path: Path) -> None:
    plan, rounded = converted(RULES["gptq"], statistics, tmp_path / "gptq")
    nearest = convert(plan_of("format: nvfp4", None), tmp_path / "nearest")
    assert rounded.relmse > nearest.relmse and nearest.calibrated_relmse is None
    error = squares = 0.0
    for entry in nearest.errors:
        pair = direct(plan, tmp_path / "nearest", entry.name, hessians=True)
        error, squares = error + pair[0], squares + pair[1]
    assert rounded.calibrated_relmse is not None and rounded.calibrated_relmse < 0.9 * error / squares


def test_only_some_rows_of_a_tall_matrix_are_looked_at(
    statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(plan_of(RULES["gptq"], statistics, "attention.o"), tmp_path / "whole").errors[0]
    monkeypatch.setattr(import_module("halfbyte.convert.calibrated_error"), "ROWS", 24)
    some = convert(plan_of(RULES["gptq"], statistics, "attention.o"), tmp_path / "some").errors[0]
    assert some.calibrated_squares != whole.calibrated_squares
    assert some.calibrated_relmse == pytest.approx(whole.calibrated_relmse, rel=0.25)


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_threads_or_memory(statistics: Path, tmp_path: Path) -> None:
    for threads, memory in ((1, 1 << 31), (3, 1 << 22)):
        converted(RULES["gptq"], statistics, tmp_path / str(threads), threads=threads, memory=memory)
    one, three = ((tmp_path / name / "halfbyte.json").read_bytes() for name in ("1", "3"))
    assert one == three and len(one) == len(plan_of(RULES["gptq"], statistics).provenance)


def test_the_output_states_it_and_every_command_shows_it(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("rules: [{match: linear, format: nvfp4, rounding: gptq}]")
    command = ["quantize", str(MODEL), str(out), "--recipe", str(recipe), "--importance", str(statistics)]
    assert main([*command, "--calibration-of-base", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    made = json.loads((out / "halfbyte.json").read_text())
    stated = calibrated_errors(made)
    relmse = sum(error for error, _ in stated.values()) / sum(squares for _, squares in stated.values())
    assert done["calibrated_relmse"] == pytest.approx(relmse, rel=1e-5) and 0 < relmse < done["relmse"]
    assert main(["verify", str(out), "--against", str(MODEL), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    by_role = [{r["role"]: r["calibrated_relmse"] or 0.0 for r in d["accuracy"]} for d in (done, verified)]
    assert by_role[1] == pytest.approx(by_role[0], rel=1e-5) and by_role[0]["experts.down"]
    document = tensor_errors(out, MODEL)
    assert document["total"]["calibrated_relmse"] == pytest.approx(relmse, rel=1e-5)
    assert main(["errors", str(out), "--against", str(MODEL)]) == 0
    assert "weighted by activations" in capsys.readouterr().out


def test_without_a_calibration_nothing_is_said_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = convert(halfbyte.plan(MODEL, linear("nvfp4")), tmp_path / "out")
    assert done.calibrated_relmse is None
    assert "calibrated_errors" not in json.loads((tmp_path / "out" / "halfbyte.json").read_text())
    assert main(["errors", str(tmp_path / "out"), "--against", str(MODEL)]) == 0
    assert "weighted by" not in capsys.readouterr().out
