"""Memory of a conversion: slices of the largest tensors, never a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from halfbyte.checkpoint import Inventory, build_header

PROGRAM = """
import pathlib, re, resource, sys
from halfbyte.convert import convert
from halfbyte.plan import make_plan
from halfbyte.recipes import Recipe
from halfbyte.view import Checkpoint

rule = {"match": ["linear", "lm_head", "embedding"], "format": "nvfp4", "search": "absmax"}
plan = make_plan(Checkpoint.open(sys.argv[1]), Recipe.model_validate({"name": "all", "rules": [rule]}))
convert(plan, sys.argv[2], workers=int(sys.argv[3]))
status = pathlib.Path("/proc/self/status")
if status.exists():  # ru_maxrss of Linux also counts the memory of the process that started this one
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def sparse_checkpoint(inventory: Inventory, folder: Path, layers: int) -> int:
    """Real names and shapes, and a hole for the weights: zeros that take no disk; returns the bytes of tensors."""
    tensors = [t for t in inventory.tensors.values() if ".layers." not in t.name or int(t.name.split(".")[2]) < layers]
    layout = build_header([(t.name, t.dtype, t.shape) for t in tensors])
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(layout.header)
        file.truncate(layout.total)
    (folder / "config.json").write_text(json.dumps(inventory.config))
    return sum(t.nbytes for t in tensors)


def test_names_and_shapes_of_qwen3_0_6b_are_quantized_in_less_than_a_gigabyte(shared: Path, tmp_path: Path) -> None:
    inventory = Inventory.from_json(shared / "inventories" / "qwen3_0_6b.json")
    size = sparse_checkpoint(inventory, tmp_path / "source", layers=2)
    assert size > 680_000_000  # more than half of the model are the embedding and lm_head
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "source"), str(tmp_path / "out"), "2"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1_000_000_000
