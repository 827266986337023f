"""Repair: what is broken is mended from the source, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.audit.faulty import beside_index, nothing, rewritten, scaled, without
from tests.small_models import Tensors, hashes, read_file

from halfbyte.audit import repair as module
from halfbyte.audit.repair import ADDED, RECORD, repair
from halfbyte.audit.repair_plan import BACKBONE
from halfbyte.audit.run_audit import audit
from halfbyte.errors import CheckpointError, OutputError

K_PROJ = "model.language_model.layers.1.self_attn.k_proj"


def mended(bad: Path, source: Path) -> tuple[Path, Any]:
    out = bad.with_name("mended")
    result = repair(bad, out, source)
    assert result is not None
    return out, result


@pytest.mark.parametrize("dialect", ["good", "modelopt"])
def test_missing_parts_come_from_the_source_and_files_of_weights_stay(
    request: pytest.FixtureRequest, source: Path, tmp_path: Path, dialect: str
) -> None:
    def shorter(config: Any) -> None:
        settings = config["quantization_config"]
        settings["ignore"] = [e for e in settings["ignore"] if "mtp" not in e and "visual" not in e]

    good = request.getfixturevalue(dialect)
    bad = rewritten(good, tmp_path / "bad", without("mtp.", "visual."), shorter)
    out, result = mended(bad, source)
    assert result.before.verdict.startswith("broken") or result.before.verdict.startswith("incomplete")
    assert result.after.ok and audit(out, source).ok
    assert hashes(out)[BACKBONE] == hashes(bad)["model.safetensors"] == result.same[BACKBONE]
    here, there = read_file(out), read_file(source)
    restored = [name for name in there if "mtp." in name or "visual." in name]
    assert restored and all(here[name].tobytes() == there[name].tobytes() for name in restored)
    assert set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == set(here)


def test_only_weights_that_were_bad_are_encoded_again(good: Path, source: Path, tmp_path: Path) -> None:
    bad = rewritten(good, tmp_path / "bad", scaled(".weight_global_scale", 1.5, K_PROJ))
    out, result = mended(bad, source)
    assert result.after.ok
    before, after = read_file(bad), read_file(out)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed and all(".layers.1.self_attn." in name for name in changed) and set(result.changed) >= changed


def test_what_is_encoded_again_is_what_a_conversion_writes(good: Path, source: Path, tmp_path: Path) -> None:
    bad = rewritten(good, tmp_path / "bad", scaled(".weight_global_scale", 1.5, K_PROJ))
    out, _ = mended(bad, source)
    wanted, after = read_file(good), read_file(out)
    assert all(wanted[name].tobytes() == after[name].tobytes() for name in wanted)


def test_a_damaged_expert_is_encoded_again(good: Path, source: Path, tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors["model.language_model.layers.0.mlp.experts.2.down_proj.weight_scale"].view(np.uint8)[0, 0] = 0x7F

    out, result = mended(rewritten(good, tmp_path / "bad", damage), source)
    assert result.after.ok and read_file(out).keys() == read_file(good).keys()


def test_ignore_lists_are_made_to_fit(good: Path, source: Path, tmp_path: Path) -> None:
    def wrong(config: Any) -> None:
        config["quantization_config"]["ignore"] = ["re:.*self_attn.*", "lm_head"]
        for group in config["quantization_config"]["config_groups"].values():
            group["targets"] = ["Linear"]

    out, result = mended(rewritten(good, tmp_path / "bad", nothing, wrong), source)
    assert not result.before.ok and result.after.ok and result.record["config_changed"]
    assert len(result.same) == 1 and not result.changed and not (out / ADDED).exists()


def test_a_file_that_calls_itself_w4a4_is_called_w4a16(good: Path, source: Path, tmp_path: Path) -> None:
    from tests.audit.test_stored_scales import inputs

    _, result = mended(rewritten(good, tmp_path / "bad", nothing, inputs), source)
    assert result.after.ok and "declared-w4a4" in result.record["mended"]


def test_missing_files_are_copied_and_differing_ones_only_when_asked(good: Path, source: Path, tmp_path: Path) -> None:
    bad = rewritten(good, tmp_path / "bad", nothing)
    (bad / "generation_config.json").unlink()
    (bad / "chat_template.jinja").write_text("{{ y }}")
    repair(bad, tmp_path / "a", source)
    repair(bad, tmp_path / "b", source, other_files=True)
    assert (tmp_path / "a" / "generation_config.json").read_bytes() == b"{}"
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == "{{ y }}"
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ x }}"


def test_a_bare_file_beside_an_index_gets_another_name(good: Path, source: Path, tmp_path: Path) -> None:
    bad = beside_index(good, tmp_path / "bad")
    out, result = mended(bad, source)
    assert result.after.ok and not (out / "model.safetensors").exists() and len(result.same) == 2


def test_a_sound_checkpoint_needs_no_repair(good: Path, source: Path, tmp_path: Path) -> None:
    assert repair(good, tmp_path / "out", source) is None and not (tmp_path / "out").exists()


def test_an_existing_folder_and_a_quantized_source_are_refused(good: Path, source: Path, tmp_path: Path) -> None:
    bad = rewritten(good, tmp_path / "bad", scaled(".weight_global_scale", 1.5, K_PROJ))
    with pytest.raises(OutputError, match="exists already"):
        repair(bad, bad, source)
    with pytest.raises(CheckpointError, match="name the unquantized source"):
        repair(bad, tmp_path / "out", good)


def test_an_interruption_leaves_neither_folder(
    good: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = rewritten(good, tmp_path / "bad", without("mtp."))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_config", stop)
    with pytest.raises(KeyboardInterrupt):
        repair(bad, tmp_path / "out", source)
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}


def test_the_record_says_what_was_done(good: Path, source: Path, tmp_path: Path) -> None:
    out, result = mended(rewritten(good, tmp_path / "bad", without("mtp.fc")), source)
    record = json.loads((out / RECORD).read_text())
    assert record == result.record and record["added"] == ["mtp.fc.weight"]
    assert record["before"].startswith("incomplete") and record["after"].startswith("sound")
