"""The audit as a whole: verdict, document, and checkpoints that cannot be read as weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.audit.faulty import nothing, rewritten, scaled, without

from halfbyte.audit.run_audit import audit
from halfbyte.errors import CheckpointError

SCALE = "layers.1.self_attn.k_proj.weight_scale"


def test_the_verdict_is_one_line_with_the_gravest_word(good: Path, source: Path, tmp_path: Path) -> None:
    assert audit(good).verdict == "sound: nvfp4, no problem found without its source"
    assert audit(good, source).verdict == "sound: nvfp4, no problem found against its source"
    without_mtp = rewritten(good, tmp_path / "a", without("mtp."))
    assert audit(without_mtp).verdict == "incomplete: nvfp4, 1 missing"
    both = rewritten(without_mtp, tmp_path / "b", scaled("k_proj.weight_global_scale", 2))
    assert audit(both).verdict == "broken: nvfp4, 1 wrong, 1 missing"


def test_engines_that_compute_other_numbers_are_named(good: Path) -> None:
    assert "global scales of NVFP4 experts" in audit(good).breaks["transformers"][0]
    assert "vLLM" not in audit(good).breaks


def test_a_weight_without_its_scale_is_a_finding_and_the_rest_is_audited(good: Path, tmp_path: Path) -> None:
    out = rewritten(good, tmp_path / "out", without(SCALE, "mtp."))
    assert [f.code for f in audit(out).problems] == ["incomplete-weight", "mtp-missing"]


def test_a_configuration_that_nobody_can_follow_is_a_finding(good: Path, tmp_path: Path) -> None:
    def strange(config: dict[str, dict[str, dict[str, dict[str, dict[str, int]]]]]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 5

    result = audit(rewritten(good, tmp_path / "out", nothing, strange))
    assert [f.code for f in result.findings] == ["unreadable"] and not result.ok
    assert result.document()["dialect"] is None and result.verdict.startswith("broken: ")


def test_a_folder_that_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        audit(tmp_path)


def test_the_document_is_json_and_holds_every_name(good: Path, source: Path, tmp_path: Path) -> None:
    document = json.loads(json.dumps(audit(good, source).document()))
    assert document["ok"] and document["schema"] == 1 and len(document["weights"]) == 17
    assert set(document["engines"]) >= {"vLLM", "transformers"}
