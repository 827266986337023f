"""What a configuration says of modules."""

from pathlib import Path

import pytest
from tests.small_models import DENSE_CONFIG, dense_tensors, run, write_checkpoint

from halfbyte.checkpoint import Inventory
from halfbyte.dialects import get_dialect
from halfbyte.dialects.declared import Declared
from halfbyte.dialects.modules import is_linear
from halfbyte.models.regex import Patterns
from halfbyte.source.checkpoint import Checkpoint


def test_expressions_names_and_targets_decide_in_compressed_tensors() -> None:
    claims = Declared(("re:.*gate$", "lm_head"), Patterns([r"re:.*layers\.\d+\..*"], "targets"), None, False)
    assert claims.quantizes("model.layers.3.mlp.up_proj")
    assert not any(claims.quantizes(name) for name in ("model.layers.3.mlp.gate", "lm_head", "model.other"))


def test_wildcards_and_prefixes_decide_in_modelopt() -> None:
    claims = Declared(("model.visual*", "mtp", "lm_head"), None, None, True)
    assert not any(claims.quantizes(name) for name in ("model.visual.merger.fc1", "mtp.layers.0.fc", "lm_head"))
    assert claims.quantizes("model.layers.0.mlp.up_proj")


def test_a_map_of_layers_names_all_that_is_quantized() -> None:
    claims = Declared((), None, frozenset({"a"}), True)
    assert claims.quantizes("a") and not claims.quantizes("b")


def test_dialects_whose_tensors_decide_declare_nothing() -> None:
    assert get_dialect("mlx").declared(Inventory({}, {})) is None


def quantized(folder: Path, dialect: str) -> Checkpoint:
    source = write_checkpoint(folder / "source", dense_tensors(), DENSE_CONFIG)
    run(source, folder / dialect, "nvfp4", dialect)
    return Checkpoint.open(folder / dialect)


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_an_output_declares_what_its_tensors_are(tmp_path: Path, dialect: str) -> None:
    checkpoint = quantized(tmp_path, dialect)
    claims = get_dialect(dialect).declared(checkpoint.inventory)
    assert claims is not None
    for weight in checkpoint.weights:
        if is_linear(weight) and weight.role != "embedding":
            module = weight.name.removesuffix(".weight")
            assert claims.quantizes(module) is (weight.name in checkpoint.formats)


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt", "halfbyte"])
def test_weight_only_files_take_no_scales_of_inputs(tmp_path: Path, dialect: str) -> None:
    checkpoint = quantized(tmp_path, dialect)
    takes = get_dialect(dialect).activations.takes_scales(checkpoint.inventory)
    weight = next(w for w in checkpoint.weights if w.name in checkpoint.formats)
    assert not takes(weight, checkpoint.formats[weight.name], weight.name.removesuffix(".weight"))
