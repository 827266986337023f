"""What a configuration says of modules."""

from pathlib import Path

from halfbyte.audit.declared import Declared, StaticInputs, declared
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


def test_dialects_whose_tensors_decide_claim_nothing(good: Path) -> None:
    assert declared(Checkpoint.open(good).inventory, "mlx") is None


def test_weight_only_files_want_no_scales_of_inputs(good: Path, modelopt: Path) -> None:
    for folder in (good, modelopt):
        checkpoint = Checkpoint.open(folder)
        inputs = StaticInputs(checkpoint)
        weight = next(w for w in checkpoint.weights if w.name in checkpoint.formats)
        assert not inputs.wants(weight, weight.name.removesuffix(".weight"))
