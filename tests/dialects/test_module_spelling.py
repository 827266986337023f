"""Spellings by declaration: an engine in 25 lines, and tables that do not fit their format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from dialects.toy_engine import ToyDialect
from halfbyte.checkpoint import Inventory, Reader
from halfbyte.dialects import ModulePart, ModuleSpelling, get_dialect, list_dialects, register_dialect
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.formats import get_format
from halfbyte.models import Piece, Weight
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, MOE_CONFIG, dense_tensors, hashes, moe_tensors, recipe, write_checkpoint

MIXED = recipe(
    {"match": ["attention", "experts"], "format": "nvfp4", "optional": True},
    {"match": ["mlp", "shared_expert"], "format": "fp8_channel", "optional": True},
    name="mixed",
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyDialect:
    """The engine, registered for one test."""
    known = {dialect.name: dialect for dialect in list_dialects()}
    monkeypatch.setattr("halfbyte.dialects.dialect._DIALECTS", known)
    dialect = ToyDialect()
    register_dialect(dialect)
    return dialect


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", moe_tensors(per_expert=True), MOE_CONFIG)


def test_a_declared_engine_is_planned_quantized_verified_and_converted(
    toy: ToyDialect, source: Path, tmp_path: Path
) -> None:
    plan = halfbyte.plan(source, MIXED, dialect="toy")
    assert {item.format.name for item in plan.items if item.format} == {"nvfp4", "fp8_channel"}
    halfbyte.quantize(plan, tmp_path / "toy")
    assert halfbyte.verify(tmp_path / "toy", source).problems == []
    halfbyte.convert(tmp_path / "toy", tmp_path / "modelopt", "modelopt")
    assert halfbyte.verify(tmp_path / "modelopt", tmp_path / "toy").problems == []
    halfbyte.convert(tmp_path / "modelopt", tmp_path / "back", "toy")
    # the provenance names another source
    changed = {name for name, digest in hashes(tmp_path / "toy").items() if hashes(tmp_path / "back")[name] != digest}
    assert changed == {"halfbyte.json"}


def test_a_declared_engine_holds_the_values_of_other_dialects(toy: ToyDialect, source: Path, tmp_path: Path) -> None:
    for name in ("toy", "halfbyte"):
        halfbyte.quantize(halfbyte.plan(source, MIXED, dialect=name), tmp_path / name)
    ours, other = (Checkpoint.open(tmp_path / name) for name in ("toy", "halfbyte"))
    assert ours.formats == other.formats and len(ours.formats) > 10
    twins = {weight.name: weight for weight in other.weights}
    with Reader(ours.inventory) as left, Reader(other.inventory) as right:
        for weight in ours.weights:
            np.testing.assert_array_equal(ours.read(left, weight), other.read(right, twins[weight.name]), weight.name)


def test_names_types_and_shapes_are_those_of_the_table(toy: ToyDialect, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG)
    halfbyte.quantize(halfbyte.plan(source, MIXED, dialect="toy"), tmp_path / "out")
    tensors = Inventory.open(tmp_path / "out").tensors
    attention, mlp = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"
    stored = {name: (tensors[name].dtype, tensors[name].shape) for name in tensors}
    assert stored[f"{attention}.qweight"] == ("I32", (128, 16))
    assert stored[f"{attention}.qscale"] == ("F8_E4M3", (128, 8))
    assert stored[f"{attention}.qmax"] == ("F32", ())
    assert stored[f"{mlp}.weight"] == ("F8_E4M3", (256, 128))
    assert stored[f"{mlp}.weight_scale"] == ("F32", (256, 1))
    assert f"{attention}.weight" not in stored


def test_a_module_whose_tensors_fit_no_format_is_refused(toy: ToyDialect, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG)
    halfbyte.quantize(halfbyte.plan(source, MIXED, dialect="toy"), tmp_path / "out")
    path = next((tmp_path / "out").glob("*.safetensors"))
    content = path.read_bytes()
    # of the same length, so that offsets stay
    path.write_bytes(content.replace(b"layers.1.self_attn.o_proj.qmax", b"layers.1.self_attn.o_proj.qmin"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj in .* are those of no format in toy"):
        Checkpoint.open(tmp_path / "out")


def test_a_format_without_a_table_and_a_weight_that_is_no_module_are_refused(toy: ToyDialect) -> None:
    def weight(name: str, role: str) -> Weight:
        return Weight(name, role, 0, (128, 128), "BF16", (Piece(name),))

    matrix = weight("model.layers.0.mlp.up_proj.weight", "mlp.up")
    assert toy.spelling.problem(matrix, get_format("nvfp4")) is None
    problem = toy.spelling.problem(matrix, get_format("mxfp4"))
    assert problem == "toy has no spelling for mxfp4; use the dialect halfbyte"
    problem = toy.spelling.problem(weight("model.layers.0.mlp.up", "mlp.up"), get_format("nvfp4"))
    assert problem is not None and "is not the weight of one" in problem


@pytest.mark.parametrize(
    "table",
    [
        {"codes": ".weight_packed", "scales": ".weight_scale"},
        {"codes": ".w", "scales": ".s", "global_scale": ".g", "offsets": ".o"},
    ],
    ids=["too few", "too many"],
)
def test_a_table_that_does_not_name_the_arrays_of_its_format_is_refused(table: dict[str, str]) -> None:
    with pytest.raises(PlanError, match="the spelling of nvfp4 in mine must name codes, scales, global_scale"):
        ModuleSpelling("mine", {"nvfp4": table})


def test_a_part_with_content_is_written_as_it_stands() -> None:
    shape = ModulePart(".shape", "I64", lambda shape: (2,), content=lambda n, k: (n, k))
    spelling = ModuleSpelling("mine", {"mxfp4": {"codes": ".w", "scales": ".s", "shape": shape}})
    name = "model.layers.0.mlp.up_proj.weight"
    outputs = spelling.outputs(Weight(name, "mlp.up", 0, (4, 64), "BF16", (Piece(name),)), get_format("mxfp4"))
    assert [(o.name.rpartition(".")[2], o.dtype, o.shape, o.constant) for o in outputs] == [
        ("w", "U8", (4, 32), None),
        ("s", "U8", (4, 2), None),
        ("shape", "I64", (2,), (4, 64)),
    ]


def test_a_name_that_is_taken_is_refused(toy: ToyDialect) -> None:
    class Impostor(ToyDialect):
        name = "compressed_tensors"

    before = get_dialect("compressed-tensors")
    with pytest.raises(PlanError, match="there is a dialect 'compressed-tensors' already"):
        register_dialect(Impostor())
    assert get_dialect("compressed-tensors") is before
    # a module that is imported twice registers the same object
    assert register_dialect(toy) is toy


def test_a_dialect_is_known_by_its_name_with_either_hyphen(toy: ToyDialect) -> None:
    class Underscored(ToyDialect):
        name = "my_engine"

    mine = register_dialect(Underscored())
    assert get_dialect("my_engine") is mine and get_dialect("my-engine") is mine
    with pytest.raises(PlanError, match=r"unknown dialect 'nothing'; known dialects: .*my_engine"):
        get_dialect("nothing")
    assert json.dumps([d.name for d in list_dialects()]).endswith('"toy", "my_engine"]')
