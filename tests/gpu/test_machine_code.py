"""What the kernels cost in machine code, for five generations of GPUs, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "gpu_machine_code.py"
ARCHITECTURES = (80, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the script counts, compiled in a process of its own, without the interpreter."""
    folder = tmp_path_factory.mktemp("code")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    arguments = ["--json", folder / "counts.json", "--formats", "nvfp4", "mixfp4", "--tokens", "8", "16"]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "counts.json").read_text())


@pytest.fixture(scope="module")
def counts(document: Any) -> dict[tuple[str, int, str, int], Any]:
    """Counts by kernel, architecture, format and tokens."""
    listed = document["counts"]
    return {(c["kernel"], c["architecture"], c["format"], c["tokens"]): c for c in listed}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_weight_costs_at_most_four_instructions(counts: Any, architecture: int) -> None:
    assert all(found["per_weight"] <= 4.0 for key, found in counts.items() if key[1] == architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_choice_of_a_codebook_costs_less_than_a_third_of_an_instruction(counts: Any, architecture: int) -> None:
    for tokens in (8, 16):
        mixed, single = (counts["dense", architecture, name, tokens]["per_weight"] for name in ("mixfp4", "nvfp4"))
        assert mixed - single <= 0.3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_spilled_and_128_registers_suffice(counts: Any, architecture: int) -> None:
    costs = {(f["spills"], f["registers"] <= 128) for key, f in counts.items() if key[1] == architecture}
    assert costs == {(0, True)}


def test_encoders_round_every_product_and_spill_nothing(document: Any) -> None:
    found = document["encodings"]
    assert {(e["architecture"], e["search"]) for e in found} == {
        (a, s) for a in ARCHITECTURES for s in ("sweep", "four_over_six")
    }
    assert all(e["contracted"] == 0 and e["spills"] == 0 and e["registers"] <= 128 for e in found)


def test_the_page_states_these_counts(counts: Any) -> None:
    """A change that makes a loop longer than docs/gpu.md says is noticed (scripts/gpu_machine_code.py --write)."""
    rows = [line for line in (REPOSITORY / "docs" / "gpu.md").read_text().splitlines() if line.startswith("| `")]
    endings = {"dense": " |", "gate_up": ", experts: gate and up |", "down": ", experts: down |"}
    for (kernel, architecture, name, tokens), found in counts.items():
        row = next(line for line in rows if line.startswith(f"| `{name}`, {tokens}{endings[kernel]}"))
        stated = float(row.split("|")[2 + ARCHITECTURES.index(architecture)].split()[0])
        assert found["per_weight"] <= stated + 0.1
