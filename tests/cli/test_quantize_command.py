from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folded import importance_of
from halfbyte.calibration import write_importance
from halfbyte.cli import main
from halfbyte.convert.conversion import convert


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_json_reports_plan_errors_and_time(run_json: Callable[..., Any], demo_model: str, tmp_path: Path) -> None:
    done = run_json("quantize", demo_model, str(tmp_path / "out"), "--recipe", "mxfp4")
    assert done["out"] == str(tmp_path / "out")
    assert 0 < done["relmse"] < 0.02
    assert done["repository_bytes"] == sum(map(len, files(tmp_path / "out").values()))
    assert done["seconds"] > 0 and done["resumed_shards"] == 0
    assert {row["format"] for row in done["accuracy"]} == {"mxfp4"}


def test_text_reports_errors_by_role(run_text: Callable[..., str], demo_model: str, tmp_path: Path) -> None:
    text = run_text("quantize", demo_model, str(tmp_path / "out"), "--recipe", "mixfp4-absmax", "--verify")
    assert "blocks by codebook" in text and "% e2m1" in text
    assert "bits per weight" in text and "MB/s" in text
    assert text.splitlines()[-1].startswith("verified: 33 weights quantized, 58 kept byte for byte")
    assert all(c.isprintable() or c == "\n" for c in text)


def test_dry_run_writes_nothing(run_json: Callable[..., Any], demo_model: str, tmp_path: Path) -> None:
    made = run_json("quantize", demo_model, str(tmp_path / "out"), "--recipe", "mxfp4", "--dry-run")
    assert made["dry_run"] is True and made["data_bytes"] > 0
    assert not (tmp_path / "out").exists()


def test_verify_adds_its_document(run_json: Callable[..., Any], demo_model: str, tmp_path: Path) -> None:
    done = run_json("quantize", demo_model, str(tmp_path / "out"), "--recipe", "mxfp4", "--verify")
    assert done["verification"]["ok"] is True
    assert done["verification"]["relmse"] == pytest.approx(done["relmse"])


def test_interruption_says_how_to_go_on_and_the_same_command_does(
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
    run_json: Callable[..., Any],
    demo_model: str,
    tmp_path: Path,
) -> None:
    def interrupted(plan: Any, out: str, *_: Any, **more: Any) -> Any:
        seen = [0]

        def report(count: int) -> None:
            seen[0] += count
            if seen[0] > 3_000_000:
                raise KeyboardInterrupt

        return convert(plan, out, 1, report)

    command = ("quantize", demo_model, str(tmp_path / "out"), "--recipe", "mxfp4", "--max-shard-size", "400kB")
    monkeypatch.setattr(sys.modules["halfbyte.convert.conversion"], "convert", interrupted)
    message = refusal(*command, code=130)
    assert message == (
        f"halfbyte: interrupted; finished files stay in {tmp_path / 'out'}: run the same command again to continue\n"
    )
    monkeypatch.undo()
    assert run_json(*command)["resumed_shards"] > 0
    whole = ("quantize", demo_model, str(tmp_path / "whole"), *command[3:])
    assert run_json(*whole)["resumed_shards"] == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_folder_in_use_is_refused(refusal: Callable[..., str], demo_model: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert "is not empty" in refusal("quantize", demo_model, str(tmp_path), "--recipe", "mxfp4")


def test_threads_must_be_a_positive_number(refusal: Callable[..., str], demo_model: str, tmp_path: Path) -> None:
    command = ("quantize", demo_model, str(tmp_path / "out"), "--recipe", "mxfp4")
    assert "'0' is no whole number" in refusal(*command, "--threads", "0")


@pytest.fixture(scope="module")
def importance(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("importance") / "importance.safetensors"
    write_importance(importance_of(Path(demo_model)), path)
    return str(path)


@pytest.mark.slow
def test_an_importance_file_weighs_and_folds(
    run_json: Callable[..., Any], demo_model: str, importance: str, tmp_path: Path
) -> None:
    command = ("quantize", demo_model, str(tmp_path / "out"), "--recipe", "ud-mxfp4", "--importance", importance)
    done = run_json(*command, "--verify")
    assert done["importance"]["importance"] == "importance.safetensors" and done["importance"]["weighted"] > 30
    smoothings = done["folds"]
    assert len(smoothings) == len(done["importance"]["folds"]) > 5
    assert set(smoothings[0]) == {"group", "alpha", "loss", "unfolded", "rounding"}
    assert done["verification"]["ok"] and done["verification"]["folded"] > 20
    assert done["repository_bytes"] == sum(map(len, files(tmp_path / "out").values()))


@pytest.mark.slow
def test_folding_is_reported_in_words(
    run_text: Callable[..., str], demo_model: str, importance: str, tmp_path: Path
) -> None:
    text = run_text(
        "quantize", demo_model, str(tmp_path / "out"), "--recipe", "ud-mxfp4", "--importance", importance, "--verify"
    )
    assert "groups smoothed; weighted error" in text and "unquantized weights in them are rounded again" in text
    assert "compared with their AWQ scales applied to the source" in text.splitlines()[-1]


def test_an_importance_file_of_another_model_is_refused(
    refusal: Callable[..., str], demo_model: str, shared: Path, tmp_path: Path
) -> None:
    command = ("quantize", demo_model, str(tmp_path / "out"), "--recipe", "nvfp4", "--importance")
    assert "made for another model" in refusal(*command, str(shared / "data" / "imatrix" / "imatrix.dat"))
    assert "nothing.dat cannot be read" in refusal(*command, str(tmp_path / "nothing.dat"))
    assert not (tmp_path / "out").exists()


def test_weights_that_the_format_cannot_hold_are_listed(
    run_text: Callable[..., str], demo_model: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("rules: [{match: linear, format: int4_g128, scale_search: absmax, if_not_divisible: keep}]")
    lines = run_text("quantize", demo_model, str(tmp_path / "out"), "--recipe", str(recipe)).splitlines()
    kept = [line for line in lines if line.startswith("kept")]
    assert len(kept) == 2 and any(
        line.startswith("kept        4 of shared_expert.down, not int4_g128: ") and "such as model." in line
        for line in kept
    )


def test_old_keys_of_a_recipe_are_named_on_stderr(
    demo_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("rules: [{match: linear, format: mxfp4, search: absmax}]")
    for command in (("recipes", str(path)), ("quantize", demo_model, str(tmp_path / "out"), "--recipe", str(path))):
        assert main(list(command)) == 0
        assert "only this release still reads: `search` is now `scale_search`\n" in capsys.readouterr().err


def test_workers_is_read_as_threads_with_a_note(
    demo_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", demo_model, "--recipe", "mxfp4", "--workers", "1"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.err == "halfbyte: --workers is now --threads; this release reads both\n"
    assert "with 1 thread(s)" in captured.out
