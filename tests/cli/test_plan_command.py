from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_json_states_sizes_tensors_and_bits(run_json: Callable[..., Any], demo_model: str) -> None:
    made = run_json("plan", demo_model, "--recipe", "nvfp4")
    assert made["recipe"] == "nvfp4" and made["dialect"] == "compressed-tensors"
    assert made["data_bytes"] == sum(c["bytes"] for c in made["classes"])
    assert made["tensors"] == sum(c["output_tensors"] for c in made["classes"])
    assert abs(made["bits_per_weight"] - 8 * made["data_bytes"] / made["parameters"]) < 1e-9
    assert made["repository_bytes"] > sum(shard["bytes"] for shard in made["shards"]) > made["data_bytes"]


def test_planned_bytes_are_the_bytes_of_the_folder(
    run_json: Callable[..., Any], demo_model: str, quantized: str
) -> None:
    made = run_json("plan", demo_model, "--recipe", "mxfp4")
    assert made["repository_bytes"] == sum(p.stat().st_size for p in Path(quantized).rglob("*") if p.is_file())


def test_an_inventory_file_is_planned_without_weights(run_json: Callable[..., Any], inventory: str) -> None:
    made = run_json("plan", "--inventory", inventory, "--recipe", "mxfp4")
    quantized = 2 * (4 * 64 * 64 + 3 * 128 * 64)
    assert made["data_bytes"] == quantized * 17 // 32 + 2 * (256 * 64 + 2 * 64)
    assert made["side_file_bytes"] == 1000


def test_dialect_decides_names_and_number_of_tensors(run_json: Callable[..., Any], demo_model: str) -> None:
    fused = run_json("plan", demo_model, "--recipe", "nvfp4", "--dialect", "halfbyte")
    split = run_json("plan", demo_model, "--recipe", "nvfp4", "--dialect", "compressed-tensors")
    assert split["dialect"] == "compressed-tensors"
    assert split["tensors"] > fused["tensors"]


def test_shard_size_decides_the_number_of_files(run_json: Callable[..., Any], demo_model: str) -> None:
    made = run_json("plan", demo_model, "--recipe", "nvfp4", "--max-shard-size", "1MB")
    assert len(made["shards"]) > 2
    assert made["index_bytes"] > 0


def test_text_shows_fates_reasons_totals(run_text: Callable[..., str], demo_model: str) -> None:
    text = run_text("plan", demo_model, "--recipe", "nvfp4", "--dialect", "halfbyte")
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["experts.down"][1:5] == ["nvfp4", "4", "->", "12"]
    assert lines["router"][1:4] == ["kept", "BF16", "4"]
    assert lines["repository"][2].startswith("bytes")
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_recipe_file_is_a_recipe(run_json: Callable[..., Any], demo_model: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rules:\n  - {match: experts, format: mxfp4}\n  - {match: mtp, drop: true, reason: unused here}\n")
    made = run_json("plan", demo_model, "--recipe", str(path))
    fates = {c["role"]: (c["action"], c["reason"]) for c in made["classes"]}
    assert fates["mtp.fc"] == ("drop", "unused here")
    assert made["recipe"] == "mine"


def test_unknown_recipe_names_the_nearest(refusal: Callable[..., str], demo_model: str) -> None:
    assert "nearest: nvfp4" in refusal("plan", demo_model, "--recipe", "nvpf4")


def test_unknown_dialect_names_the_known(refusal: Callable[..., str], demo_model: str) -> None:
    message = refusal("plan", demo_model, "--recipe", "nvfp4", "--dialect", "exotic", "--json")
    assert "known dialects: compressed-tensors" in message


def test_recipe_is_required(refusal: Callable[..., str], demo_model: str) -> None:
    assert "--recipe" in refusal("plan", demo_model)


def test_shard_size_must_be_a_size(refusal: Callable[..., str], demo_model: str) -> None:
    assert "'huge' is no size" in refusal("plan", demo_model, "--recipe", "nvfp4", "--max-shard-size", "huge")


def test_tensors_adds_every_fate_and_place(run_json: Callable[..., Any], demo_model: str) -> None:
    made = run_json("plan", demo_model, "--recipe", "nvfp4", "--tensors")
    assert len(made["sources"]) == 91
    assert len(made["outputs"]) == made["tensors"]


def test_remote_code_is_part_of_the_planned_repository(
    run_json: Callable[..., Any], run_text: Callable[..., str], demo_model: str
) -> None:
    command = ("plan", demo_model, "--recipe", "nvfp4", "--dialect", "halfbyte")
    with_code = run_json(*command, "--remote-code")["repository_bytes"]
    assert with_code > run_json(*command)["repository_bytes"] + 5000
    assert "halfbyte_modules.py" in run_text(*command, "--remote-code")


def test_remote_code_is_refused_for_dialects_that_need_none(refusal: Callable[..., str], demo_model: str) -> None:
    command = ("plan", demo_model, "--recipe", "nvfp4", "--dialect", "compressed-tensors")
    assert "remote code is for the dialect halfbyte" in refusal(*command, "--remote-code")
