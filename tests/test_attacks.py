"""attacks/README.md: every attack names tests, and these tests exist."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = (REPOSITORY / "attacks" / "README.md").read_text(encoding="utf-8")


def test_every_test_that_an_attack_names_is_there() -> None:
    named = re.findall(r"^`(tests/\S+)::(test_\w+)`$", TEXT, re.MULTILINE)
    assert len(named) >= 20
    for path, name in named:
        assert f"def {name}(" in (REPOSITORY / path).read_text(encoding="utf-8"), f"{path}::{name}"


def test_every_attack_names_a_test() -> None:
    for story in re.split(r"^\*\*", TEXT, flags=re.MULTILINE)[1:]:
        assert re.search(r"^`tests/", story, re.MULTILINE), story[:40]
