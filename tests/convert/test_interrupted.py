"""Conversions that are killed, at any moment, and continued."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfbyte.convert.conversion import convert
from halfbyte.errors import OutputError, VerifyError
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import MOE_CONFIG, hashes, linear, moe_tensors, write_checkpoint

PROGRAM = Path(__file__).with_name("converting.py")
SHARD_BYTES = 100_000


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG, shards=2)


def plan_of(source: Path) -> Plan:
    return make_plan(Checkpoint.open(source), linear("nvfp4"), "compressed-tensors", SHARD_BYTES)


def start(
    source: Path, out: Path, kill_at: int = 0, threads: int = 2, importance: Path | None = None
) -> subprocess.Popen[str]:
    arguments = [str(source), str(out), "compressed-tensors", str(SHARD_BYTES), str(threads), str(kill_at)]
    arguments += [str(importance)] if importance else []
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def uninterrupted(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """Hashes of all files, and how many system calls made them."""
    out = tmp_path_factory.mktemp("whole") / "out"
    child = start(moe, out)
    text, errors = child.communicate()
    assert child.returncode == 0, errors
    return hashes(out), int(text)


# spread over the whole run with one random point in each part; the last ones hit side files, index and config
POINTS = [(k + random.Random(7).random()) / 8 for k in range(8)] + [0.985, 0.995, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_conversion_continues_to_the_same_bytes(
    moe: Path, tmp_path: Path, uninterrupted: tuple[dict[str, str], int], point: float
) -> None:
    wanted, calls = uninterrupted
    out = tmp_path / "out"
    child = start(moe, out, max(1, int(point * calls)))
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    if (out / ".halfbyte").exists():
        with pytest.raises(VerifyError, match="unfinished conversion; run the same quantize command again"):
            verify(out, moe)
    else:  # killed with everything done
        assert hashes(out) == wanted
        return
    plan = plan_of(moe)
    done = convert(plan, out, threads=1)
    assert hashes(out) == wanted and len(plan.shards) > 5
    if 0.2 < point < 1:
        assert done.resumed_shards > 0  # what was finished is not done again
    assert len(done.errors) == sum(item.format is not None for item in plan.items)


@pytest.mark.slow
def test_killed_from_outside_again_and_again_it_still_gets_there(
    moe: Path, tmp_path: Path, uninterrupted: tuple[dict[str, str], int]
) -> None:
    out = tmp_path / "out"
    for finished in (1, 3, 5):
        child = start(moe, out)
        while child.poll() is None and len(list(out.glob("*.safetensors"))) < finished:
            time.sleep(0.001)
        child.kill()
        child.communicate()
        if child.returncode == 0:  # it was done before the signal came
            break
        assert not (out / "config.json").exists()
    else:
        convert(plan_of(moe), out)
    assert hashes(out) == uninterrupted[0]


@pytest.mark.slow
def test_an_unfinished_output_of_another_plan_is_not_continued(moe: Path, tmp_path: Path) -> None:
    child = start(moe, tmp_path / "out", 40)
    child.communicate()
    other = make_plan(Checkpoint.open(moe), linear("mxfp4"), "compressed-tensors", SHARD_BYTES)
    with pytest.raises(OutputError, match="holds the unfinished output of another conversion"):
        convert(other, tmp_path / "out")


@pytest.mark.slow
def test_a_finished_file_that_was_cut_meanwhile_is_written_again(
    moe: Path, tmp_path: Path, uninterrupted: tuple[dict[str, str], int]
) -> None:
    out = tmp_path / "out"
    start(moe, out, uninterrupted[1] * 3 // 4).communicate()
    first = sorted(out.glob("*.safetensors"))[0]
    os.truncate(first, 1000)
    convert(plan_of(moe), out)
    assert hashes(out) == uninterrupted[0]
