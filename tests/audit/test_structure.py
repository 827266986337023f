"""Parts that are missing, and what the ignore list makes of what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.audit.faulty import audited, beside_index, codes_of, nothing, rewritten, without
from tests.small_models import Tensors, run

from halfbyte.audit.run_audit import audit


def quantization(change: Any) -> Any:
    return lambda config: change(config["quantization_config"])


def test_a_good_checkpoint_has_no_problem(good: Path, modelopt: Path) -> None:
    assert audit(good).ok and audit(modelopt).ok


@pytest.mark.parametrize(("part", "code"), [("mtp.", "mtp-missing"), ("visual.", "vision-missing")])
def test_parts_that_the_configuration_promises_are_missed(good: Path, tmp_path: Path, part: str, code: str) -> None:
    assert code in codes_of(audited(good, tmp_path / "out", without(part)))


def test_a_missing_layer_is_named(good: Path, tmp_path: Path) -> None:
    result = audited(good, tmp_path / "out", without(".layers.1."))
    found = next(f for f in result.findings if f.code == "layers-missing")
    assert found.what.endswith("lack 1 layer: 1")


def test_a_missing_tokenizer_is_found(good: Path, tmp_path: Path) -> None:
    out = rewritten(good, tmp_path / "out", nothing)
    (out / "tokenizer.json").unlink()
    assert "tokenizer-missing" in codes_of(audit(out))


def test_a_bare_file_beside_an_index_that_names_others_is_found(good: Path, tmp_path: Path) -> None:
    assert "bare-file-beside-index" in codes_of(audit(beside_index(good, tmp_path / "out")))


def test_matrices_that_neither_codes_nor_the_ignore_list_cover_are_found(good: Path, tmp_path: Path) -> None:
    def shorter(settings: dict[str, Any]) -> None:
        settings["ignore"] = [e for e in settings["ignore"] if "mtp" not in e and "visual" not in e]
        for group in settings["config_groups"].values():
            group["targets"] = ["Linear"]

    result = audited(good, tmp_path / "out", nothing, config=quantization(shorter))
    assert {"wide-but-not-ignored", "mtp-not-ignored"} <= codes_of(result)


def test_codes_of_a_module_on_the_ignore_list_are_found(good: Path, tmp_path: Path) -> None:
    def longer(settings: dict[str, Any]) -> None:
        settings["ignore"].append("re:.*self_attn.*")

    result = audited(good, tmp_path / "out", nothing, config=quantization(longer))
    found = next(f for f in result.findings if f.code == "ignored-but-quantized")
    assert all("self_attn" in name for name in found.tensors) and len(found.tensors) == 4


def test_wildcards_of_modelopt_are_compared_with_the_modules(modelopt: Path, tmp_path: Path) -> None:
    def shorter(settings: dict[str, Any]) -> None:
        settings["ignore"] = []

    result = audited(modelopt, tmp_path / "out", nothing, config=quantization(shorter))
    assert "wide-but-not-ignored" in codes_of(result)


def test_entries_of_the_ignore_list_that_match_nothing_are_a_note(good: Path, tmp_path: Path) -> None:
    def longer(settings: dict[str, Any]) -> None:
        settings["ignore"].append("model.layers.7.mlp.gate")

    result = audited(good, tmp_path / "out", nothing, config=quantization(longer))
    assert result.ok and [f.tensors for f in result.findings if f.code == "ignore-matches-nothing"] == [
        ("model.layers.7.mlp.gate",)
    ]


def test_expressions_that_vllm_renames_away_are_found(good: Path, tmp_path: Path) -> None:
    def anchored(settings: dict[str, Any]) -> None:
        settings["ignore"].append(r"re:model\.language_model\.layers\.\d+\.mlp\.gate$")

    assert "ignore-anchored" in codes_of(audited(good, tmp_path / "out", nothing, config=quantization(anchored)))


def test_experts_under_names_that_no_engine_maps_are_found(good: Path, tmp_path: Path) -> None:
    def fused(tensors: Tensors) -> None:
        prefix = "model.language_model.layers.0.mlp.experts."
        for kind in ("_packed", "_scale", "_global_scale"):
            parts = [tensors[f"{prefix}{e}.down_proj.weight{kind}"] for e in range(4)]
            tensors[f"{prefix}down_proj{kind}"] = np.stack(parts)
        without(*(f"layers.0.mlp.experts.{e}.down" for e in range(4)))(tensors)

    result = audited(good, tmp_path / "out", fused)
    found = next(f for f in result.findings if f.code == "unmapped-codes")
    assert "vllm-project/llm-compressor#2939" in found.seen


def test_packed_codes_without_a_configuration_are_found(good: Path, tmp_path: Path) -> None:
    result = audited(good, tmp_path / "out", nothing, config=lambda config: config.pop("quantization_config"))
    assert "no-configuration" in codes_of(result)


def test_experts_that_stayed_wide_are_poor(source: Path, tmp_path: Path) -> None:
    from tests.small_models import recipe

    run(source, tmp_path / "out", recipe({"match": "attention", "format": "nvfp4"}), "compressed-tensors")
    result = audit(tmp_path / "out")
    found = next(f for f in result.findings if f.code == "left-wide" and f.severity == "poor")
    assert "of experts" in found.what


def test_projections_that_engines_fuse_must_have_one_format(good: Path, source: Path, tmp_path: Path) -> None:
    from tests.small_models import read_file

    wide = read_file(source)

    def unlike(tensors: Tensors) -> None:
        name = "model.language_model.layers.1.self_attn.k_proj"
        without(name)(tensors)
        tensors[f"{name}.weight"] = wide[f"{name}.weight"]

    assert "fused-unlike" in codes_of(audited(good, tmp_path / "out", unlike))
