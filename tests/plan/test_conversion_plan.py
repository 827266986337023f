"""The plan as a whole: what its fingerprint covers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from halfbyte.dialects import get_dialect
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, dense_tensors, linear, write_checkpoint


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    source = write_checkpoint(tmp_path_factory.mktemp("dense") / "dense", dense_tensors(), DENSE_CONFIG)
    return make_plan(Checkpoint.open(source), linear("nvfp4"), extra_files={"README.md": b"card"})


@pytest.mark.parametrize(
    "change",
    [
        {"config": b"{}"},
        {"config": None},
        {"extra_files": {"README.md": b"another card"}},
        {"extra_files": {"CARD.md": b"card"}},
        {"recipe": linear("nvfp4", scale_search="sweep")},
        {"dialect": get_dialect("compressed-tensors")},
        {"origin": {}},
        {"shards": []},
    ],
    ids=lambda change: " ".join(change),
)
def test_a_plan_for_other_bytes_has_another_fingerprint(plan: Plan, change: dict[str, Any]) -> None:
    assert replace(plan).fingerprint == plan.fingerprint
    assert replace(plan, **change).fingerprint != plan.fingerprint
