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
from halfbyte.serve.routing_rules import parse_rules
from halfbyte.source.checkpoint import Checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = Path(str(resources.files("halfbyte") / "demo_model"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    REPOSITORY / "README.md",
    *(page for page in sorted((REPOSITORY / "docs").glob("*.md")) if page.name != "extending.md"),
]
MARKDOWN = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)")
TARGET = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")
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
    elif "rules" in content and "default" in content:
        assert parse_rules(text, "page").rules
    elif "rules" in content:
        assert make_plan(Checkpoint.open(DEMO), parse_recipe(text, "page", "page")).bits_per_weight < 16
    else:  # a key beside the rules
        assert parse_recipe(f"{text}rules: [{{match: linear, format: nvfp4}}]", "page", "page")


@pytest.mark.parametrize("line", named(commands()))
def test_commands_of_the_pages_have_these_options(line: str) -> None:
    assert build_parser().parse_args(shlex.split(line)[1:]).command == line.split()[1]


def test_the_pages_have_code_of_every_kind() -> None:
    assert len(blocks("python")) >= 3 and len(blocks("yaml")) >= 5 and len(commands()) >= 10


def test_the_index_links_every_page() -> None:
    linked = set(LINK.findall((REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")))
    docs = REPOSITORY / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} - {"index.md"}
    assert pages - linked == set()


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_between_pages_lead_to_a_file_and_a_heading(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in TARGET.findall(text):
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} links {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run_in_order(tmp_path: Path) -> None:
    for package in ("torch", "highspy", "altair"):
        pytest.importorskip(package)
    shutil.copytree(DEMO, tmp_path / "Qwen" / "Qwen3-8B")
    for name in ("calibration.txt", "held-out.txt"):
        shutil.copy(DEMO / "heldout.txt", tmp_path / name)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "HF_HUB_OFFLINE": "1"}
    env["HALFBYTE_CACHE"] = str(tmp_path / "cache")
    lines = [line for page, line in commands() if page == "tutorial.md"]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line)[1:]
        if "--text" in words or "calibration.txt" in words:  # less text than a user would take
            words += ["--max-tokens", "512"] if words[0] in ("evaluate", "allocate") else ["--samples", "4"]
            words += ["--length", "64"]
        done = subprocess.run(
            [sys.executable, "-m", "halfbyte", *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, (line, done.stderr)
