"""What a checkpoint holds that no dialect reads: methods of others, packed codes, models without language."""

from __future__ import annotations

from collections.abc import Iterator

from halfbyte.dialects.quantization_config import quantization_fields
from halfbyte.models import Weight
from halfbyte.models.roles import bare_role
from halfbyte.source.checkpoint import Checkpoint

PACKED = frozenset(
    {
        *("U8", "I8", "U16", "I16", "U32", "I32", "F4", "F6_E2M3", "F6_E3M2"),
        *("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"),
    }
)
"""Types of codes and their scales; unquantized weights have none of them."""
WIDE = frozenset({"I64", "U64", "BOOL"})
"""Types that indices and masks have too, so that only a matrix's name tells codes."""
# integers that are indices, whatever their shape
_INDICES = ("tid2eid", "position_ids", "relative_position_index", "relative_coords_table", "d2t", "token_type_ids")
_UNKNOWN = ("other", "vision.other", "mtp.other")
# by which tensors a method can be told, the surest first
_SIGNS = (
    (".qzeros", "GPTQ or AWQ"),
    (".qweight", "GPTQ or AWQ"),
    (".SCB", "bitsandbytes in 8 bits"),
    (".absmax", "bitsandbytes in 4 bits"),
    (".codebooks", "AQLM"),
    (".Qidxs", "QuIP#"),
    (".trellis", "EXL3"),
    (".q_weight", "EXL2"),
    (".W_q", "HQQ"),
    ("._data", "optimum-quanto"),
    (".weight_scales", "EETQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "FP8 in blocks"),
    ("_blocks", "the MXFP4 of gpt-oss"),
    (".biases", "MLX"),
    (".weight_scale", "FP8"),
)


def unread_codes(checkpoint: Checkpoint) -> Iterator[Weight]:
    """Give the tensors that hold codes of which nothing says how they are quantized."""
    for weight in checkpoint.weights:
        if weight.dtype not in PACKED | WIDE or weight.name in checkpoint.formats:
            continue
        if weight.dtype in WIDE and not weight.name.endswith((".weight", *(sign for sign, _ in _SIGNS))):
            continue
        if (
            weight.dtype in WIDE
            or weight.role.startswith("quantized.")
            or (weight.role in _UNKNOWN and not _is_index(weight))
        ):
            yield weight


def unread_method(checkpoint: Checkpoint) -> str:
    """Name the method of a quantization_config that no dialect reads; "" where there is none."""
    settings = quantization_fields(checkpoint.inventory)
    if checkpoint.dialect is not None or not settings:
        return ""
    if method := settings.text("quant_method"):
        return method
    if any(key.startswith(("load_in_", "bnb_")) for key in settings.values):
        return "bitsandbytes"
    return f"a method without a name ({', '.join(sorted(map(str, settings.values))[:4])})"


def likely_method(checkpoint: Checkpoint) -> str:
    """Guess from the names of tensors which method wrote packed codes; "" where nothing tells."""
    names = list(checkpoint.inventory.tensors)
    return next((method for ending, method in _SIGNS if any(name.endswith(ending) for name in names)), "")


def without_language_model(checkpoint: Checkpoint) -> bool:
    """Tell whether all matrices belong to a vision model."""
    matrices = [w for w in checkpoint.weights if len(w.shape) > 1]
    return bool(matrices) and all(bare_role(w.role).startswith("vision.") for w in matrices)


def _is_index(weight: Weight) -> bool:
    if weight.name.rpartition(".")[2] in _INDICES or len(weight.shape) < 2:
        return True
    # a list of numbers, such as positions or a map between vocabularies
    return weight.dtype in ("I16", "I32", "U16", "U32") and sum(n > 1 for n in weight.shape) < 2
