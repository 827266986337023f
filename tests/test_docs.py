"""The code of README and docs runs as it stands there; docs/extending.md has tests of its own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml

from halfbyte.cli import build_parser
from halfbyte.compatibility.engine_facts import Engine
from halfbyte.models.family_schema import parse
from halfbyte.plan.build import make_plan
from halfbyte.recipes import parse_recipe
from halfbyte.source.checkpoint import Checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = Path(str(resources.files("halfbyte") / "demo_model"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    REPOSITORY / "README.md",
    *(page for page in sorted((REPOSITORY / "docs").glob("*.md")) if page.name != "extending.md"),
]
# models that the pages name; here each of them is the demo model
MODELS = ("Qwen/Qwen3-8B", "path/to/model")


def blocks(*kinds: str) -> list[tuple[str, str]]:
    """Page and content of every code block of these kinds."""
    texts = [(page.name, page.read_text(encoding="utf-8")) for page in PAGES]
    return [(name, code) for name, text in texts for kind, code in BLOCK.findall(text) if kind in kinds]


def named(pairs: list[tuple[str, str]]) -> list[object]:
    return [pytest.param(text, id=f"{page}-{number}") for number, (page, text) in enumerate(pairs)]


def commands() -> list[tuple[str, str]]:
    """Every command line of the pages, without the remark behind it."""
    lines = [(page, line) for page, code in blocks("", "bash", "sh", "console") for line in code.splitlines()]
    return [(page, re.split(r"\s{3,}|\s#", line)[0]) for page, line in lines if line.startswith("halfbyte ")]


@pytest.mark.slow
@pytest.mark.parametrize("code", named(blocks("python")))
def test_python_of_the_pages_runs(code: str, tmp_path: Path) -> None:
    if "halfbyte.load(" in code:
        pytest.importorskip("torch")
    for model in MODELS:
        shutil.copytree(DEMO, tmp_path / model)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", named(blocks("yaml")))
def test_yaml_of_the_pages_is_valid(text: str) -> None:
    content = yaml.safe_load(text)
    if isinstance(content, list):
        assert [Engine.model_validate(entry).name for entry in content]
    elif "model_types" in content:
        assert parse(text, "page").extended(parse("name: base", "base")).name == content["name"]
    elif "rules" in content:
        assert make_plan(Checkpoint.open(DEMO), parse_recipe(text, "page", "page")).bits_per_weight < 16
    else:  # a key beside the rules
        assert parse_recipe(f"{text}rules: [{{match: linear, format: nvfp4}}]", "page", "page")


@pytest.mark.parametrize("line", named(commands()))
def test_commands_of_the_pages_have_these_options(line: str) -> None:
    assert build_parser().parse_args(shlex.split(line)[1:]).command == line.split()[1]


def test_the_pages_have_code_of_every_kind() -> None:
    assert len(blocks("python")) >= 3 and len(blocks("yaml")) >= 5 and len(commands()) >= 10
