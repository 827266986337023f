from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from halfbyte import kernels
from halfbyte.errors import PlanError
from halfbyte.runtime import load
from halfbyte.runtime.remote_code import remote_code_config, remote_code_files
from halfbyte.verify.weights import verify
from small_models import linear, run

SCRIPT = """
import sys

import numpy as np
import torch
import transformers

try:
    import halfbyte
except ImportError:
    pass
else:
    raise SystemExit("halfbyte must not be importable here")
torch.set_num_threads(1)
folder, auto_class, out = sys.argv[1:]
for _ in range(2):  # registering again must not fail
    auto = getattr(transformers, auto_class)
    model = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
names = {type(module).__name__ for module in model.modules()}
assert "QuantizedLinear" in names, names
with torch.inference_mode():
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])).logits
np.save(out, logits.numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "auto_class"),
    [("qwen3_moe", "AutoModelForCausalLM"), ("qwen3_5_moe", "AutoModelForImageTextToText")],
)
def test_a_checkpoint_with_remote_code_loads_exactly_where_halfbyte_is_not_installed(
    architecture: str, auto_class: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    source, path = saved(architecture), tmp_path / "model"
    config = json.loads((source / "config.json").read_text())
    run(
        source,
        path,
        linear("mixfp4", if_not_divisible="keep"),
        extra_files=remote_code_files(config),
        extra_config=remote_code_config(),
    )
    # python runs this file first: whether halfbyte is installed or on the path, it cannot be imported
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['halfbyte'] = None\n")
    settings = {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, **settings}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), auto_class, str(tmp_path / "logits.npy")],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # without compiled products both sides decode alike
    with torch.inference_mode(), kernels.use_backend("reference"):
        expected = load(path, "float32")(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])).logits
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected.numpy())
    assert verify(path, source).problems == []


def test_remote_code_is_made_of_files_that_need_no_halfbyte() -> None:
    for content in remote_code_files({}).values():
        assert b"import halfbyte" not in content and b"from halfbyte." not in content
        assert content.count(b"\n") < 300


def test_a_source_with_remote_code_of_its_own_is_refused() -> None:
    with pytest.raises(PlanError, match="remote code of its own"):
        remote_code_files({"auto_map": {"AutoModelForCausalLM": "modeling_other.Other"}})


def test_a_source_that_has_our_remote_code_already_is_fine() -> None:
    assert remote_code_files(remote_code_config())
