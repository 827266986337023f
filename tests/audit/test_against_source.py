"""A checkpoint beside its source: what is missing or differs, and weights worse than they need be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.audit.faulty import codes_of, nothing, rewritten, scaled, without
from tests.invented import invented_statistics
from tests.small_models import run, write_checkpoint

import halfbyte
from halfbyte.audit.run_audit import audit
from halfbyte.demo import MODEL

EXPERTS = "model.language_model.layers.1.mlp.experts.gate_up_proj"
UP = "model.language_model.layers.1.mlp.experts.3.up_proj"


def test_a_good_checkpoint_is_sound_beside_its_source(good: Path, source: Path) -> None:
    result = audit(good, source)
    assert result.ok and len(result.compared) == 17
    assert all(-1.5 < weight.worse_db < 0.1 for weight in result.compared)


def test_modules_made_without_care_stand_out_by_decibels(good: Path, source: Path, tmp_path: Path) -> None:
    out = rewritten(good, tmp_path / "out", scaled(".weight_scale", 0.5, UP))
    result = audit(out, source)
    worst = max(result.compared, key=lambda weight: weight.worse_db)
    assert worst.worst == f"up of expert 3 of {EXPERTS}" and 14 < worst.worse_db < 16
    assert codes_of(result) == {"worse-than-nearest"}


def test_another_model_is_told_from_a_bad_one(good: Path, tmp_path: Path) -> None:
    from tests.audit.conftest import CONFIG
    from tests.small_models import moe_tensors

    other = write_checkpoint(tmp_path / "other", moe_tensors(seed=1), CONFIG)
    assert "another-weight" in codes_of(audit(good, other))


def test_weights_of_the_source_that_are_missing_are_listed_by_part(good: Path, source: Path, tmp_path: Path) -> None:
    out = rewritten(good, tmp_path / "out", without("mtp.fc", "visual.merger"))
    assert {"source-mtp-missing", "source-vision-missing"} <= codes_of(audit(out, source))


def test_kept_weights_that_differ_are_a_note(good: Path, source: Path, tmp_path: Path) -> None:
    out = rewritten(good, tmp_path / "out", scaled("1.input_layernorm.weight", 1.5))
    result = audit(out, source)
    assert [f.tensors for f in result.findings if f.code == "kept-differ"] == [
        ("model.language_model.layers.1.input_layernorm.weight",)
    ]


def test_tokenizer_files_are_compared(good: Path, source: Path, tmp_path: Path) -> None:
    out = rewritten(good, tmp_path / "out", nothing)
    (out / "generation_config.json").unlink()
    (out / "chat_template.jinja").write_text("{{ y }}")
    result = audit(out, source)
    assert codes_of(result) == {"files-missing"}
    assert [f.tensors for f in result.findings if f.code == "files-differ"] == [("chat_template.jinja",)]


@pytest.mark.parametrize("dialect", ["halfbyte", "modelopt", "mlx"])
def test_every_dialect_is_compared(source: Path, tmp_path: Path, dialect: str) -> None:
    run(source, tmp_path / "out", "mxfp4" if dialect == "mlx" else "nvfp4", dialect)
    result = audit(tmp_path / "out", source)
    assert not [f for f in result.problems if f.severity != "missing"] and len(result.compared) >= 10


def test_halfbyte_notes_which_weights_a_calibration_moved(tmp_path: Path) -> None:
    out, statistics = tmp_path / "out", invented_statistics(tmp_path / "statistics")
    halfbyte.quantize(MODEL, out, "nvfp4-gptq", dialect="compressed-tensors", importance=statistics)
    result = audit(out, MODEL)
    assert "moved" in {f.code for f in result.findings}
    assert all(w.moved and w.outputs is not None for w in result.compared if w.role.startswith("attention"))
    changed = json.loads((out / "halfbyte.json").read_text())
    changed["recipe"]["name"] = "other"
    (out / "halfbyte.json").write_text(json.dumps(changed))
    assert not any(w.moved for w in audit(out, MODEL).compared)
