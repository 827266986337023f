"""What `pip install .` alone gives: commands that need no extra run without any package of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from halfbyte.source.checkpoint import Checkpoint

DEMO = Path(halfbyte.__file__).parent / "demo_model"
PROGRAM = """
import sys

EXTRAS = {"torch", "transformers", "safetensors", "accelerate", "tokenizers", "compressed_tensors", "gguf", "lm_eval",
          "datasets", "highspy", "altair", "vl_convert", "jinja2", "mlx", "mlx_lm", "matplotlib", "vllm",
          "starlette", "uvicorn", "httpx", "prometheus_client", "openai", "fastapi"}


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
from halfbyte.cli import main

raise SystemExit(main(sys.argv[1:]))
"""


def halfbyte_alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_checkpoint_is_made_converted_and_verified_without_any_extra(tmp_path: Path) -> None:
    out, other, demo = str(tmp_path / "out"), str(tmp_path / "other"), str(DEMO)
    for command in (
        ("inspect", demo),
        ("plan", demo, "--recipe", "nvfp4"),
        ("quantize", demo, out, "--recipe", "nvfp4", "--dialect", "compressed-tensors", "--verify"),
        ("convert", out, other, "--dialect", "modelopt"),
        ("verify", other),
        ("verify", out, "--against", demo),
        ("errors", out, "--against", demo),
        ("recipes",),
        ("formats",),
    ):
        done = halfbyte_alone(*command)
        assert done.returncode == 0, (command, done.stderr[-600:])


def test_importance_of_llama_cpp_is_read_without_its_library(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "imatrix")
    writer.add_type("imatrix")
    shape = next(w.shape for w in Checkpoint.open(DEMO).weights if w.name.endswith("layers.0.mlp.experts.down_proj"))
    writer.add_tensor("blk.0.ffn_down_exps.weight.in_sum2", np.ones((shape[0], shape[2]), np.float32))
    writer.add_tensor("blk.0.ffn_down_exps.weight.counts", np.ones((shape[0], 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = halfbyte_alone("plan", str(DEMO), "--recipe", "nvfp4", "--importance", str(tmp_path / "imatrix.gguf"))
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.slow
def test_a_command_that_needs_an_extra_names_it(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "text.txt").write_text("some text")
    for extra, command in {
        "report": ("report", str(tmp_path / "results.json"), "-o", str(tmp_path / "r.html")),
        "transformers": ("evaluate", str(DEMO), "--text", str(tmp_path / "text.txt")),
        "allocate": ("allocate", str(DEMO), "--budget", "3MB", "-o", str(tmp_path / "r.yaml")),
    }.items():
        done = halfbyte_alone(*command)
        assert done.returncode == 2 and f"halfbyte[{extra}]" in done.stderr, (command, done.stderr[-600:])
        assert "this is a bug" not in done.stderr
