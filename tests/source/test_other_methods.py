"""Settings and tensors of methods that no dialect reads, in the places that other tools put them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.convert.conversion import convert
from halfbyte.errors import PlanError
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import DENSE_CONFIG, dense_tensors, write_checkpoint

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("key", ["quant_config", "quantize_config", "quantization_config"])
@pytest.mark.parametrize("settings", [{"quant_method": "hqq"}, {"quant_method": ""}, {"w_bit": 4}])
@pytest.mark.parametrize("place", [(), ("text_config",), ("generator", "inner_config")])
def test_settings_of_other_tools_are_found_wherever_they_stand(
    tmp_path: Path, key: str, settings: dict[str, Any], place: tuple[str, ...]
) -> None:
    config = json.loads(json.dumps(DENSE_CONFIG))
    part = config
    for name in place:
        part = part.setdefault(name, {})
    part[key] = settings
    source = write_checkpoint(tmp_path / "m", dense_tensors(), config)
    with pytest.raises(PlanError, match="which cannot be read; start from another source"):
        make_plan(Checkpoint.open(source), "nvfp4")


@pytest.mark.parametrize(
    "arrays",
    [
        lambda n, k: {".Qidxs": np.zeros((16, 16), np.int64), ".SU": np.ones(k, np.float16)},
        lambda n, k: {".weight": np.zeros((n, k), np.int64)},
        lambda n, k: {".weight": np.zeros((n, k), bool)},
    ],
    ids=["QuIP#", "I64", "BOOL"],
)
def test_codes_in_types_that_indices_have_are_codes_all_the_same(
    tmp_path: Path, arrays: Callable[[int, int], dict[str, np.ndarray]]
) -> None:
    tensors = dense_tensors()
    n, k = tensors.pop(f"{MODULE}.weight").shape
    tensors |= {MODULE + ending: array for ending, array in arrays(n, k).items()}
    source = write_checkpoint(tmp_path / "m", tensors, DENSE_CONFIG)
    with pytest.raises(PlanError, match="holds packed codes"):
        make_plan(Checkpoint.open(source), "nvfp4")


def test_indices_and_masks_are_no_codes(tmp_path: Path) -> None:
    extra = {
        "model.position_ids": np.arange(8, dtype=np.int64)[None],
        "model.layers.0.self_attn.bias": np.ones((1, 1, 8, 8), bool),
    }
    source = write_checkpoint(tmp_path / "m", dense_tensors() | extra, DENSE_CONFIG)
    make_plan(Checkpoint.open(source), "nvfp4")


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_settings_in_a_file_beside_plain_weights_are_not_copied_and_the_plan_says_so(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(tmp_path / "m", dense_tensors(), DENSE_CONFIG)
    (source / name).write_text(json.dumps({"bits": 4, "quant_method": "gptq"}))
    plan = make_plan(Checkpoint.open(source), "mxfp4")
    assert any(name in note for note in plan.notes)
    convert(plan, tmp_path / "o")
    assert not (tmp_path / "o" / name).exists() and verify(tmp_path / "o", source).problems == []
