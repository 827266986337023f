"""Memory of a conversion: what the plan states, slices of the largest tensors, never a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.checkpoint import Inventory, build_header
from halfbyte.plan.build import make_plan
from halfbyte.plan.resources import Limits
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear

PROGRAM = """
import json, pathlib, re, resource, sys
from halfbyte.convert.conversion import convert
from halfbyte.plan.build import make_plan
from halfbyte.plan.resources import Limits
from halfbyte.recipes import Recipe
from halfbyte.source.checkpoint import Checkpoint

source, out, recipe, threads, memory = sys.argv[1:]
plan = make_plan(Checkpoint.open(source), Recipe.model_validate_json(recipe))
convert(plan, out, threads=int(threads), memory=int(memory))
status = pathlib.Path("/proc/self/status")
if status.exists():  # ru_maxrss of Linux also counts the memory of the process that started this one
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak, plan.resources(Limits(int(threads), int(memory))).memory)
"""
MIB = 1 << 20


def sparse(folder: Path, config: object, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    """Names and shapes, and a hole for the weights: zeros that take no disk."""
    layout = build_header([(name, dtype, shape) for name, (dtype, shape) in tensors.items()])
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(layout.header)
        file.truncate(layout.total)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dense(folder: Path, shared: Path) -> Path:
    """Two layers, embedding and lm_head of Qwen3-0.6B: 680 MB, more than half of it in two matrices."""
    inventory = Inventory.from_json(shared / "inventories" / "qwen3_0_6b.json")
    some = {
        name: (t.dtype, t.shape)
        for name, t in inventory.tensors.items()
        if ".layers." not in name or int(name.split(".")[2]) < 2
    }
    return sparse(folder, inventory.config, some)


def experts(folder: Path, count: int = 16, rows: int = 1024, columns: int = 2048) -> Path:
    """A layer of large experts."""
    config = {"model_type": "qwen3_5_moe_text", "num_experts": count, "hidden_size": columns, "num_hidden_layers": 1}
    base = "model.layers.0.mlp.experts"
    stacks = {f"{base}.gate_up_proj": (count, 2 * rows, columns), f"{base}.down_proj": (count, columns, rows)}
    return sparse(folder, config, {name: ("BF16", shape) for name, shape in stacks.items()})


def many(folder: Path, layers: int) -> Path:
    """Many small tensors, one per projection of an expert."""
    config = {"model_type": "qwen3_moe", "num_experts": 128, "hidden_size": 64, "num_hidden_layers": layers}
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": ("BF16", shape)
        for layer in range(layers)
        for expert in range(128)
        for name, shape in shapes.items()
    }
    return sparse(folder, config, tensors)


def measured(source: Path, out: Path, fmt: str, threads: int, memory: int, **more: str) -> tuple[int, int]:
    """Peak resident memory of a conversion in a process of its own, and what the plan states."""
    chosen = ["attention"] if fmt == "keep" else ["linear", "lm_head", "embedding"]
    rule = {"format": "nvfp4" if fmt == "keep" else fmt, "scale_search": "absmax", "optional": True, **more}
    recipe = {"name": "all", "rules": [{"match": role, **rule} for role in chosen]}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(source), str(out), json.dumps(recipe), str(threads), str(memory)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, stated = map(int, done.stdout.split())
    return peak, stated


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fmt", "threads", "memory"),
    [("nvfp4", 4, 2048), ("nvfp4", 2, 64), ("fp8_tensor", 2, 4096), ("keep", 2, 2048)],
)
def test_a_dense_model_takes_the_memory_that_the_plan_states(
    shared: Path, tmp_path: Path, fmt: str, threads: int, memory: int
) -> None:
    source = dense(tmp_path / "source", shared)
    peak, stated = measured(source, tmp_path / "out", fmt, threads, memory * MIB)
    assert stated / 2 < peak <= stated


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "memory"), [(1, 2048), (4, 2048), (4, 64)])
def test_experts_take_the_memory_that_the_plan_states(tmp_path: Path, threads: int, memory: int) -> None:
    peak, stated = measured(experts(tmp_path / "source"), tmp_path / "out", "mixfp4", threads, memory * MIB)
    assert stated / 2 < peak <= stated


@pytest.mark.slow
@pytest.mark.parametrize("memory", [2048, 64])
def test_fitting_tensor_scales_takes_the_memory_that_the_plan_states(shared: Path, tmp_path: Path, memory: int) -> None:
    source = dense(tmp_path / "source", shared)
    peak, stated = measured(source, tmp_path / "out", "nvfp4", 2, memory * MIB, global_scale="soar")
    assert stated / 2 < peak <= stated


@pytest.mark.slow
def test_many_tensors_take_the_memory_that_the_plan_states(tmp_path: Path) -> None:
    peak, stated = measured(many(tmp_path / "source", 60), tmp_path / "out", "nvfp4", 2, 2048 * MIB)
    assert stated / 2 < peak <= stated


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size_of_a_model(tmp_path: Path) -> None:
    few = measured(experts(tmp_path / "few", 8), tmp_path / "a", "nvfp4", 2, 2048 * MIB)
    more = measured(experts(tmp_path / "more", 32), tmp_path / "b", "nvfp4", 2, 2048 * MIB)
    assert more[1] == few[1] and more[0] < few[0] + 20 * MIB


def test_a_smaller_budget_means_fewer_threads_and_less_memory(tmp_path: Path) -> None:
    plan = make_plan(Checkpoint.open(experts(tmp_path / "source", rows=4096)), linear("nvfp4"))
    small, default = (plan.resources(Limits(8, size * MIB)) for size in (200, 2048))
    assert small.threads < default.threads == 8
    assert small.memory < default.memory
    assert plan.resources(Limits(8, 1)).threads == 1
