from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.checkpoint import Inventory, Reader
from halfbyte.dialects.halfbyte import suffix
from halfbyte.errors import CheckpointError
from halfbyte.formats import get_format, list_formats
from halfbyte.search import encode
from halfbyte.source.checkpoint import Checkpoint
from small_models import MOE_CONFIG, linear, moe_tensors, read_file, recipe, run, write_checkpoint

FUSED = "model.language_model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "moe", moe_tensors(), MOE_CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", list_formats())
def test_every_format_is_stored_as_its_arrays_and_read_back(moe: Path, tmp_path: Path, fmt: str) -> None:
    plan = run(moe, tmp_path / "out", recipe({"match": "experts", "format": fmt, "scale_search": "absmax"}))
    stored = read_file(tmp_path / "out")
    wanted = encode(moe_tensors()[FUSED], fmt, "absmax")
    for part in get_format(fmt).parts(wanted.shape):
        assert stored[f"{FUSED}_{suffix(part)}"].tobytes() == getattr(wanted, part).tobytes(), part
    ours = Checkpoint.open(tmp_path / "out")
    weight = next(w for w in ours.weights if w.name == FUSED)
    with Reader(ours.inventory) as reader:
        assert np.array_equal(ours.read(reader, weight), wanted.decode())
        assert np.array_equal(ours.read(reader, weight, 1, 3), wanted.decode()[1:3])
    assert len(ours.inventory.tensors) == plan.tensors


def test_experts_stay_fused(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"))
    infos = Inventory.open(tmp_path / "out").tensors
    found = {n: (t.dtype, t.shape) for n, t in infos.items() if n.startswith(FUSED)}
    assert found == {
        f"{FUSED}_codes": ("U8", (4, 256, 64)),
        f"{FUSED}_scales": ("U8", (4, 256, 8)),
        f"{FUSED}_tensor_scale": ("F32", (4,)),
    }


def test_the_configuration_states_tables_selector_and_patterns(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", linear("mixfp4"))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "halfbyte" and settings["version"] == 1
    about = settings["formats"]["mixfp4"]
    assert about["block"] == [1, 16] and about["scale"] == "e4m3" and about["selector"] == "scale byte >> 7"
    assert about["tensor_scale"] == "multiplier"
    assert about["table_values"][0][1] == 0.5 and about["table_values"][1][15] == -7
    assert (
        r"re:(?!(?:.*\.)?(?:mtp|visual)\.).*layers\.\d+\.mlp\.experts\.gate_up_proj$" in settings["weights"]["mixfp4"]
    )


def edited(folder: Path, change: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=9), "version 9 of the halfbyte dialect, but this release reads version 1"),
        (lambda s: s["formats"].update(nvfp5={}), "a format that this release does not know"),
        (
            lambda s: s["formats"]["nvfp4"].update(block=[1, 32]),
            r"says block = \[1, 32\], but this release means \[1, 16\]",
        ),
        (lambda s: s.update(weights={}), "does not say which format .* has; the checkpoint is damaged"),
    ],
)
def test_a_configuration_that_means_something_else_is_an_error(
    moe: Path, tmp_path: Path, change: Any, message: str
) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(edited(tmp_path / "out", change))


def test_a_missing_array_is_an_error(moe: Path, tmp_path: Path) -> None:
    from small_models import write_file

    run(moe, tmp_path / "out", linear("nvfp4"))
    tensors = read_file(tmp_path / "out")
    del tensors[f"{FUSED}_scales"]
    write_file(tmp_path / "out" / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"lacks the tensor .*gate_up_proj_scales"):
        Checkpoint.open(tmp_path / "out")
