"""Losses by type of task, and the rules that follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.cli import main
from halfbyte.errors import HalfbyteError
from halfbyte.serve.by_task import is_valid_call, learned_rules, prompts_of, rules_text
from halfbyte.serve.decision import Precision
from halfbyte.serve.routing_rules import load_rules, parse_rules

DEMO = Path(halfbyte.__file__).parent / "demo_model"
RULES = parse_rules(
    """
default: 16bit
rules:
  - {name: coding, precision: 16bit, keywords: [code]}
  - {name: chat, precision: 4bit, keywords: [hello]}
  - {name: calls, precision: 4bit, tools: true}
  - {name: other, precision: 4bit, images: true}
""",
    "rules",
)
BOTH = [Precision("w4", 4.0), Precision("w16", 16.0)]
TOOLS = [{"function": {"name": "weather", "parameters": {"required": ["city"]}}}]


def row(task: str, precision: str, kl: float, calls: float | None = None) -> dict[str, Any]:
    return {
        "task": task,
        "precision": precision,
        "kl": kl,
        "answer_length": 9.0,
        "valid_tool_calls": calls,
        "prompts": 3,
    }


def test_every_task_gets_the_fewest_bits_that_keep_the_loss() -> None:
    rows = [row("coding", "w16", 0), row("chat", "w16", 0), row("calls", "w16", 0, 1.0), row("default", "w16", 0)]
    rows += [row("coding", "w4", 0.01), row("chat", "w4", 0.2), row("calls", "w4", 0, 0.5), row("default", "w4", 0.01)]
    learned = learned_rules(RULES, rows, BOTH, 0.05)
    chosen = {rule.name: rule.precision for rule in learned.rules}
    assert chosen == {"coding": "w4", "chat": "w16", "calls": "w16", "other": "w4"} and learned.default == "w4"
    assert learned.rules[1].measured["w4"].kl == 0.2
    assert parse_rules(rules_text(learned), "written") == learned


def test_prompts_belong_to_the_task_they_name_or_to_the_rule_that_matches() -> None:
    prompts = prompts_of([{"prompt": "hello"}, {"prompt": "hello", "task": "coding"}, {"prompt": "x"}], RULES)
    assert [prompt.task for prompt in prompts] == ["chat", "coding", "default"]
    with pytest.raises(HalfbyteError, match="prompt 1: the task 'poetry' is no rule of rules"):
        prompts_of([{"prompt": "hello", "task": "poetry"}], RULES)
    with pytest.raises(HalfbyteError, match="no prompts"):
        prompts_of([], RULES)


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>', True),
        ('{"name": "weather", "arguments": {"city": "Oslo"}}', True),
        ('{"name": "weather", "arguments": {}}', False),
        ('{"name": "news", "arguments": {"city": "Oslo"}}', False),
        ("It is cold.", False),
        ("[1]", False),
    ],
)
def test_a_tool_call_names_a_tool_and_its_required_arguments(answer: str, valid: bool) -> None:
    assert is_valid_call(answer, TOOLS) is valid


def test_evaluate_by_task_writes_rules_that_serve_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    halfbyte.quantize(DEMO, tmp_path / "nvfp4", "nvfp4", dialect="halfbyte")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"fix my code"\n"explain the rain"\n')
    out = tmp_path / "rules.yaml"
    options = ["--by-task", str(prompts), "--rules", "quantclaw", "--max-loss", "10", "--write-rules", str(out)]
    command = ["evaluate", str(tmp_path / "nvfp4"), "--against", str(DEMO), *options, "--max-tokens", "4", "--json"]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["task"], r["precision"]) for r in rows] == [
        (task, precision) for precision in ("bf16", "nvfp4") for task in ("coding", "comprehension")
    ]
    assert rows[0]["kl"] == 0 and 0 < rows[2]["kl"] < 10
    learned = {rule.name: rule for rule in load_rules(out).rules}
    assert learned["coding"].precision == "nvfp4" and learned["coding"].measured["nvfp4"].kl == rows[2]["kl"]
    assert main(command[:3] + command[4:] + ["--max-loss", "1"]) == 2  # without --against
