"""Files of the development agree with each other: workflows, Makefile, pre-commit, constraints, changelog."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def read(name: str) -> str:
    return (REPOSITORY / name).read_text()


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_targets_and_variables_that_the_makefile_has(workflow: Path) -> None:
    makefile = read("Makefile")
    for command in (step.get("run", "") for step in steps(workflow)):
        for target, variable in re.findall(r"^make (\S+)(?: (\w+)=)?", command, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
            assert not variable or re.search(rf"^{variable} \?=", makefile, re.MULTILINE), variable


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_the_repository(workflow: Path) -> None:
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}


def test_pull_requests_are_tested_from_the_oldest_python_on() -> None:
    (oldest,) = re.findall(r'requires-python = ">=(.+)"', read("pyproject.toml"))
    matrix = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]["strategy"]["matrix"]
    minors = [int(version.removeprefix("3.")) for version in matrix["python"]]
    assert matrix["python"][0] == oldest
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert {system.partition("-")[0] for system in matrix["os"]} == {"ubuntu", "macos"}


def test_hooks_have_the_versions_of_the_constraints() -> None:
    (pinned,) = re.findall(r"^ruff==\S+$", read("constraints.txt"), re.MULTILINE)
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    packages = [package for hook in repository["hooks"] for package in hook.get("additional_dependencies", ())]
    assert {package for package in packages if package.startswith("ruff")} == {pinned}


def test_the_changelog_has_the_usual_form() -> None:
    sections = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert sections[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", section) for section in sections[1:])
    assert set(re.findall(r"^### (.+)$", read("CHANGELOG.md"), re.MULTILINE)) <= KINDS
