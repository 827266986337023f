from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from halfbyte.plan.build import make_plan
from halfbyte.recipes import Recipe
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import run

DEMO = Path(str(resources.files("halfbyte") / "demo_model"))
GOLDEN = Path(__file__).parent.parent / "golden" / "provenance_0_1.json"


@pytest.fixture(scope="module")
def old() -> dict[str, Any]:
    """The halfbyte.json that version 0.1 wrote for the bundled model."""
    content: dict[str, Any] = json.loads(GOLDEN.read_text())
    return content


def test_an_output_of_the_release_before_is_verified_by_its_recipe(old: dict[str, Any], tmp_path: Path) -> None:
    run(DEMO, tmp_path / "out", Recipe.model_validate(old["recipe"]))
    (tmp_path / "out" / "halfbyte.json").write_bytes(GOLDEN.read_bytes())
    assert verify(tmp_path / "out", DEMO).problems == []
    old["recipe"]["rules"][1]["format"] = "int4_g32"
    (tmp_path / "out" / "halfbyte.json").write_text(json.dumps(old))
    assert any("mxfp4, but the recipe wants it int4_g32" in p for p in verify(tmp_path / "out", DEMO).problems)


def test_a_plan_notes_the_old_keys_of_its_recipe(old: dict[str, Any]) -> None:
    notes = make_plan(Checkpoint.open(DEMO), Recipe.model_validate(old["recipe"])).notes
    assert notes[0].startswith("recipe of-0.1 uses keys that only this release still reads: `search` is now")
