from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from halfbyte.checkpoint import Reader
from halfbyte.errors import OutputError
from halfbyte.evaluate import TextSettings, evaluate, sensitivity
from halfbyte.evaluate.by_group import units_of
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear, read_file, recipe, run, write_file

DEMO = Path(halfbyte.__file__).parent / "demo_model"
MEASURE: dict[str, Any] = {"length": 64, "max_tokens": 400}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sensitivity(
        DEMO, linear("mxfp4"), tmp_path_factory.mktemp("sensitivity") / "s.jsonl", TextSettings(**MEASURE)
    )


@pytest.mark.slow
def test_each_group_is_measured_and_all_together(found: dict[str, Any], tmp_path: Path) -> None:
    run(DEMO, tmp_path / "out", linear("mxfp4"))
    quantized = Checkpoint.open(tmp_path / "out")
    *groups, whole = found["groups"]
    names = [name for group in groups for name in group["weights"]]
    assert len(names) == len(set(names)) and whole["group"] == "all" and set(whole["weights"]) == set(names)
    # the class has no multi-token prediction, which the recipe does not quantize either
    assert set(names) == set(quantized.formats)
    assert all(0 < group["kl"]["mean"] < whole["kl"]["mean"] for group in groups)
    assert sum(group["bytes"] for group in groups) == whole["bytes"]
    row = evaluate(tmp_path / "out", DEMO, **MEASURE)[1]
    assert whole["kl"]["mean"] == pytest.approx(row["kl"]["mean"], rel=1e-3)
    assert whole["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)


@pytest.mark.slow
def test_one_group_is_what_a_recipe_for_it_alone_gives(found: dict[str, Any], tmp_path: Path) -> None:
    group = next(g for g in found["groups"] if g["group"].endswith("experts"))
    rules = [
        {"match": f"re:^{name.replace('.', '[.]')}$", "format": "mxfp4", "scale_search": "absmax"}
        for name in group["weights"]
    ]
    run(DEMO, tmp_path / "one", recipe(*rules))
    row = evaluate(tmp_path / "one", DEMO, **MEASURE)[1]
    assert group["kl"]["mean"] == pytest.approx(row["kl"]["mean"], rel=1e-3)


@pytest.mark.slow
def test_an_interrupted_run_continues_where_it_stopped(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.jsonl"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(DEMO, linear("mxfp4"), path, TextSettings(**MEASURE), progress=stop)
    assert len(path.read_text().splitlines()) == 3
    with path.open("a") as file:
        file.write('{"group": "torn')
    again = sensitivity(DEMO, linear("mxfp4"), path, TextSettings(**MEASURE))
    assert again["groups"] == found["groups"]
    assert [p.name for p in tmp_path.iterdir()] == ["s.jsonl"]
    done = path.read_text()
    lines: list[str] = []
    last = sensitivity(DEMO, linear("mxfp4"), path, TextSettings(**MEASURE), announce=lines.append)
    assert last["groups"] == again["groups"]
    assert lines == [f"{path} is complete already: {len(again['groups'])} groups were measured before"]
    assert path.read_text() == done


def test_a_file_of_another_measurement_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"halfbyte": "sensitivity", "version": 1, "source": "a", "recipe": "b", "key": "c"}))
    with pytest.raises(OutputError, match="of a with b"):
        sensitivity(DEMO, linear("mxfp4"), path, TextSettings(**MEASURE))
    path.write_text("something else")
    with pytest.raises(OutputError, match="no sensitivity file"):
        sensitivity(DEMO, linear("mxfp4"), path, TextSettings(**MEASURE))


@pytest.mark.slow
def test_the_source_is_as_it_was_after_a_group(tmp_path: Path) -> None:
    copy = shutil.copytree(DEMO, tmp_path / "model")
    sensitivity(copy, linear("mxfp4"), tmp_path / "s.jsonl", TextSettings(length=64, max_tokens=130), by="role")
    with Reader(Checkpoint.open(copy).inventory) as one, Reader(Checkpoint.open(DEMO).inventory) as other:
        for name in one.inventory.tensors:
            assert np.array_equal(one.read(name), other.read(name))


@pytest.mark.slow
def test_tied_embeddings_that_a_checkpoint_holds_twice_are_one_group(tmp_path: Path) -> None:
    copy = shutil.copytree(DEMO, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = read_file(copy / "model.safetensors")
    write_file(copy / "model.safetensors", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    ends = recipe({"match": ["embedding", "lm_head"], "format": "mxfp4", "scale_search": "absmax"})
    one, whole = sensitivity(copy, ends, tmp_path / "s.jsonl", TextSettings(length=64, max_tokens=130))["groups"]
    assert one["roles"] == ["embedding", "lm_head"] and one["kl"] == whole["kl"]


def test_weights_are_grouped_as_engines_fuse_them_or_by_role_or_not_at_all() -> None:
    weights = [w for w in Checkpoint.open(DEMO).weights if w.role.startswith(("attention", "experts"))]
    groups = {unit.name: sorted(w.role for w in unit.weights) for unit in units_of(weights, "group")}
    assert ["attention.k", "attention.q", "attention.v"] in groups.values()
    assert ["experts.down", "experts.gate_up"] in groups.values()
    assert {len(unit.weights) for unit in units_of(weights, "role")} == {1}
    assert [unit.name for unit in units_of(weights, "weight")] == [w.name for w in weights]
