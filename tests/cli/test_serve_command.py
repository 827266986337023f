"""The command line of ``serve``: explanations and refusals, without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import halfbyte
from halfbyte.cli import main

DEMO = str(Path(halfbyte.__file__).parent / "demo_model")


def test_explain_prints_the_decision_of_every_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"fix my code"\n"good day"\n')
    models = [f"fast={DEMO}", f"exact={DEMO}"]
    assert main(["serve", *models, "--rules", "quantclaw", "--explain", str(prompts)]) == 0
    printed = capsys.readouterr().out
    assert "coding" in printed and "default" in printed and "mean KL not measured" in printed
    assert main(["serve", *models, "--rules", "quantclaw", "--explain", str(prompts), "--json"]) == 0
    assert [d["rule"] for d in json.loads(capsys.readouterr().out)["decisions"]] == ["coding", "default"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([DEMO, "--explain", "x"], "--explain needs --rules"),
        ([DEMO, "--json"], "--json goes with --explain"),
        ([DEMO, "--engine", "mlx", "--router", "--api-key-file", "/no/such"], "the key file /no/such cannot be read"),
        ([DEMO, "--engine", "llamacpp"], "llamacpp does not load unquantized folders"),
        ([DEMO, DEMO], "2 models have the precision bf16"),
        ([DEMO, "--rules", "nothing"], "built-in rules are quantclaw"),
        (["/no/such/model"], "/no/such/model"),
    ],
)
def test_refusals_are_one_sentence(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_rules_for_models_that_are_not_served_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("default: bf16\nrules: [{name: a, precision: nvfp4, tools: true}]")
    assert main(["serve", DEMO, "--rules", str(rules)]) == 2
    assert "rule a: there is no precision 'nvfp4' here" in capsys.readouterr().err
