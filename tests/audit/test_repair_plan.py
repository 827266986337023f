"""Which findings a repair takes on."""

from __future__ import annotations

from pathlib import Path

from tests.audit.faulty import rewritten, scaled, without

from halfbyte.audit.repair_plan import RepairPlan, plan_repair
from halfbyte.audit.run_audit import audit, drop_incomplete
from halfbyte.source.checkpoint import Checkpoint


def planned(bad: Path, source: Path) -> RepairPlan:
    ours = Checkpoint.open(bad)
    list(drop_incomplete(ours))
    return plan_repair(audit(bad, source), ours, Checkpoint.open(source), False)


def test_all_that_share_a_scale_are_encoded_together(good: Path, source: Path, tmp_path: Path) -> None:
    name = "model.language_model.layers.1.self_attn"
    plan = planned(rewritten(good, tmp_path / "bad", scaled("k_proj.weight_global_scale", 2)), source)
    assert {w.name for w in plan.again} == {f"{name}.{p}_proj.weight" for p in "qkv"} and not plan.added


def test_missing_weights_are_added_and_nothing_is_left(good: Path, source: Path, tmp_path: Path) -> None:
    plan = planned(rewritten(good, tmp_path / "bad", without("mtp.")), source)
    assert plan.added and all(w.name.startswith("mtp.") for w in plan.added) and not plan.left and not plan.again


def test_what_no_repair_mends_is_left(good: Path, source: Path, tmp_path: Path) -> None:
    plan = planned(rewritten(good, tmp_path / "bad", without("layers.1.self_attn.k_proj.weight_scale")), source)
    assert "incomplete-weight" in [f.code for f in plan.left] and not plan.added


def test_a_sound_checkpoint_gives_an_empty_plan(good: Path, source: Path) -> None:
    assert planned(good, source).empty
