from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import halfbyte
import halfbyte.checkpoint.shared_journal as shared_journal
from halfbyte.convert.conversion import convert
from halfbyte.convert.workers import convert_files, files_of, finish, finish_if_last, missing_files
from halfbyte.demo import MODEL
from halfbyte.errors import OutputError, PlanError, VerifyError
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.recipes import parse_recipe
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from invented import invented_statistics
from small_models import MOE_CONFIG, hashes, linear, moe_tensors, write_checkpoint

WORKER = """
import sys
from importlib import import_module
import time
work_unit = import_module("halfbyte.convert.work_unit")
encode = work_unit.encode_slice
def slow(*arguments):
    time.sleep(float(sys.argv[4]))
    return encode(*arguments)
work_unit.encode_slice = slow
from halfbyte.convert.workers import convert_files, files_of
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear
plan = make_plan(Checkpoint.open(sys.argv[1]), linear("nvfp4"), "halfbyte", 40_000)
convert_files(plan, sys.argv[2], files_of(plan, 0, int(sys.argv[3])), threads=1)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)


@pytest.fixture(scope="module")
def plan(source: Path) -> Plan:
    return make_plan(Checkpoint.open(source), linear("nvfp4"), "halfbyte", 40_000)


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(plan, out)
    return hashes(out)


def start(source: Path, out: Path, workers: int, pause: float = 0.0) -> subprocess.Popen[str]:
    tests = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([tests, *(entry for entry in sys.path if entry)])
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(source), str(out), str(workers), str(pause)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_workers_in_any_order_write_what_one_process_does(plan: Plan, tmp_path: Path, whole: dict[str, str]) -> None:
    out = tmp_path / "out"
    assert len(plan.shards) >= 4
    for worker in (2, 0, 1):
        convert_files(plan, out, files_of(plan, worker, 3))
        if worker != 1:
            with pytest.raises(OutputError, match="are not finished"):
                finish(plan, out)
        assert finish_if_last(plan, out) == (worker == 1)
    assert hashes(out) == whole and missing_files(plan, out) == []
    assert finish(plan, out).already_complete and convert_files(plan, out, files_of(plan, 0, 3)).already_complete


def test_an_unfinished_output_says_so(plan: Plan, tmp_path: Path) -> None:
    convert_files(plan, tmp_path / "out", files_of(plan, 0, 2))
    with pytest.raises(VerifyError, match="halfbyte finish"):
        verify(tmp_path / "out")
    with pytest.raises(OutputError, match="not empty"):
        convert(plan, tmp_path / "out")


def test_two_workers_on_the_same_files_both_succeed(source: Path, plan: Plan, tmp_path: Path, whole) -> None:
    racing = [start(source, tmp_path / "out", 1, 0.01) for _ in range(2)]
    for worker in racing:
        assert worker.wait(120) == 0, worker.stderr.read()
    assert finish_if_last(plan, tmp_path / "out") and hashes(tmp_path / "out") == whole


def test_a_killed_worker_loses_only_its_open_files(source: Path, plan: Plan, tmp_path: Path, whole) -> None:
    out = tmp_path / "out"
    worker = start(source, out, 1, 0.05)
    while worker.poll() is None and len(list((out / ".halfbyte" / "done").glob("*.json"))) < 2:
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert list(out.glob("*.partial"))
    left = missing_files(plan, out)
    assert 0 < len(left) < len(plan.shards)
    assert convert_files(plan, out, [shard.name for shard in plan.shards]).resumed_shards == len(plan.shards) - len(
        left
    )
    finish(plan, out)
    assert hashes(out) == whole


def test_threads_that_race_for_the_end_complete_it_once(plan: Plan, tmp_path: Path, whole: dict[str, str]) -> None:
    convert_files(plan, tmp_path / "out", [shard.name for shard in plan.shards])
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: finish_if_last(plan, tmp_path / "out"), range(4)))
    assert hashes(tmp_path / "out") == whole


def test_another_recipe_another_release_and_another_source_are_refused(
    source: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names = tmp_path / "out", files_of(plan, 0, 4)
    convert_files(plan, out, names)
    other = make_plan(Checkpoint.open(source), linear("mxfp4"), "halfbyte", 40_000)
    with pytest.raises(OutputError, match="by another recipe or from another source"):
        convert_files(other, out, files_of(other, 0, 4))
    changed = write_checkpoint(tmp_path / "moe", moe_tensors(seed=1), MOE_CONFIG)
    with pytest.raises(OutputError, match="would mix two models"):
        convert_files(make_plan(Checkpoint.open(changed), linear("nvfp4"), "halfbyte", 40_000), out, names)
    monkeypatch.setattr(shared_journal, "__version__", "9.9")
    with pytest.raises(OutputError, match=r"written by halfbyte .*, and this is 9\.9"):
        convert_files(plan, out, names)


def test_workers_and_files_that_do_not_exist_are_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no worker 3 of 3"):
        files_of(plan, 3, 3)
    with pytest.raises(PlanError, match="no weight file x"):
        convert_files(plan, tmp_path / "out", ["x"])
    assert files_of(plan, 90, 100) == [] and convert_files(plan, tmp_path / "out", []).errors == []


@pytest.mark.parametrize("fmt", ["nvfp4", "int4_g32", "razer", "mxfp4"])
def test_plans_travel_to_other_processes(source: Path, fmt: str, tmp_path: Path) -> None:
    made = make_plan(Checkpoint.open(source), linear(fmt), "halfbyte", 40_000)
    sent = pickle.loads(pickle.dumps(made))
    assert sent.fingerprint == made.fingerprint
    convert(made, tmp_path / "a")
    convert(sent, tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize("rule", ["format: nvfp4, rounding: gptq", "format: mxfp4, transform: awq"])
def test_workers_with_statistics_write_what_one_process_does(tmp_path: Path, rule: str) -> None:
    statistics = invented_statistics(tmp_path / "statistics")
    recipe = parse_recipe(f"rules: [{{match: [attention.o, experts.down], {rule}}}]", "t", "t")
    made = halfbyte.plan(MODEL, recipe, importance=statistics, max_shard_bytes=300_000)
    convert(made, tmp_path / "whole")
    sent = pickle.loads(pickle.dumps(made))  # as an executor sends it
    for worker in (1, 0):
        convert_files(sent, tmp_path / "out", files_of(sent, worker, 2))
    finish(sent, tmp_path / "out")
    assert len(made.shards) > 1 and hashes(tmp_path / "out") == hashes(tmp_path / "whole")
