"""How much of every architecture of transformers halfbyte recognises: ``results/architectures.json`` and its table.

Each class that makes text (causal, image and text, sequence to sequence) is built without memory (torch's meta
device) from the configuration that its model type has by default, with at most six layers and eight experts. Its
tensors get the names that transformers saves, and the family's roles are asked of them:

* ``share``: of all parameters in matrices, without embeddings, output head, positions and the encoders of images and
  sound, how many are ``linear``, which the recipes for whole models quantize;
* ``unknown``: patterns of matrices without a role, which every recipe keeps.

    python benchmarks/architectures.py [--classes PART ...]     survey, write the results (not for a part) and the table
    python benchmarks/architectures.py --tables                 the table alone

Needs the newest transformers; the committed results name the version.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import types
import warnings
from collections import Counter
from math import prod
from typing import Any

from common import REPOSITORY, RESULTS, head, replace_part, write_results
from halfbyte.errors import HalfbyteError
from halfbyte.models import family_for
from halfbyte.models.roles import LINEAR, TOWERS, bare_role, is_under

DOCUMENT = REPOSITORY / "docs" / "architectures.md"
MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth"),
    *("decoder_layers", "encoder_layers", "num_encoder_layers", "num_decoder_layers"),
)
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "ffn_num_experts")
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")
APART = ("embedding", "lm_head", "position", "per_layer.embedding")
MOST_LAYERS, MOST_EXPERTS, SECONDS = 6, 8, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", help="only classes whose name contains one of these")
    parser.add_argument("--tables", action="store_true", help="write the table from the results")
    args = parser.parse_args()
    if not args.tables:
        rows = survey(args.classes or [])
        for row in rows:
            print(json.dumps(row))
        if args.classes:
            return
        write_results(RESULTS / "architectures.json", {**head("transformers", "torch"), "rows": rows}, rows="rows")
    write_table()


def survey(parts: list[str]) -> list[dict[str, Any]]:
    """One row per class, by name."""
    quiet()
    wanted = {name: kind for name, kind in classes().items() if not parts or any(part in name for part in parts)}
    return [row(name, kind) for name, kind in sorted(wanted.items())]


def quiet() -> None:
    """No warnings of classes, and an error from one that takes too long."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _too_slow)


def classes() -> dict[str, str]:
    """Names of transformers' classes that make text -> model type."""
    from transformers.models.auto import modeling_auto

    result: dict[str, str] = {}
    for mapping in MAPPINGS:
        for kind, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).items():
            result.setdefault(names if isinstance(names, str) else names[0], kind)
    return result


def row(name: str, kind: str) -> dict[str, Any]:
    """What the family of a class recognises, or why the class could not be built."""
    try:
        tensors, config = build(name, kind)
    except Exception as error:  # whatever a class raises when it is built from its default configuration
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"class": name, "model_type": kind, "not_built": f"{type(error).__name__}: {line}"[:160]}
    family = family_for(config, tensors)
    result = {"class": name, "model_type": kind, "family": family.name}
    try:
        weights = family.weights(types.SimpleNamespace(tensors=tensors, config=config))
    except HalfbyteError as error:
        return {**result, "refused": str(error)[:160]}
    linear, rest, unknown = 0, 0, Counter()
    for weight in weights:
        if len(weight.shape) < 2 or weight.role.startswith(TOWERS) or bare_role(weight.role) in APART:
            continue
        size = prod(weight.shape)
        is_linear = any(is_under(bare_role(weight.role), role) for role in LINEAR)
        linear, rest = linear + size * is_linear, rest + size * (not is_linear)
        if bare_role(weight.role).endswith("other"):
            unknown[re.sub(r"(?<![^.])\d+(?![^.])", "{n}", weight.name)] += size
    share = linear / (linear + rest) if linear + rest else 1.0
    return {**result, "share": round(share, 3), "unknown": [pattern for pattern, _ in unknown.most_common(3)]}


def build(name: str, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors by the name that transformers saves them under, and the configuration."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def attempt(smaller: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        config = CONFIG_MAPPING[kind]()
        if smaller:
            shrink(config)
        with torch.device("meta"):
            model = getattr(transformers, name)(config)
        tied = set(model.all_tied_weights_keys)
        state = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
        saved = {
            key: types.SimpleNamespace(name=key, dtype="BF16", shape=tuple(tensor.shape))
            for key, tensor in revert_weight_conversion(model, state).items()
        }
        return saved, {**json.loads(config.to_json_string(use_diff=False)), "architectures": [name]}

    signal.alarm(SECONDS)
    try:
        return attempt(True)
    except Exception:  # some configurations check that their numbers agree
        return attempt(False)
    finally:
        signal.alarm(0)


def shrink(config: Any) -> None:
    """Leave a few layers and experts, here and in the configurations inside."""
    for key, value in config.to_dict().items():
        if key in LAYERS and isinstance(value, int) and value > MOST_LAYERS:
            _set(config, key, MOST_LAYERS)
        elif key in EXPERTS and isinstance(value, int) and value > MOST_EXPERTS:
            _set(config, key, MOST_EXPERTS)
        elif key in KINDS and isinstance(value, list):
            _set(config, key, value[:MOST_LAYERS])
    for key in getattr(config, "sub_configs", {}):
        inner = getattr(config, key, None)
        if inner is not None and not isinstance(inner, dict):
            shrink(inner)


def _set(config: Any, key: str, value: Any) -> None:
    try:
        setattr(config, key, value)
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return  # computed from other keys


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"not built within {SECONDS} s")


def write_table() -> None:
    """The table of docs/architectures.md."""
    results = json.loads((RESULTS / "architectures.json").read_text())
    replace_part(DOCUMENT, "architectures", table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown: a sentence of totals, and a line per class."""
    rows = results["rows"]
    built = [row for row in rows if "not_built" not in row]
    known = [row for row in built if row["family"] != "generic"]
    most = [row for row in built if row.get("share", 0) >= 0.95]
    lines = [
        f"transformers {results['versions']['transformers']} has {len(rows)} classes that make text; {len(built)} can "
        f"be built from their default configuration. halfbyte has a family for {len(known)} of these, and quantizes at "
        f"least 95 % of the matrices in {len(most)} (`benchmarks/architectures.py`, {results['date']}).",
        "",
        "| class | family | quantized | without a role |",
        "|---|---|--:|---|",
    ]
    for entry in rows:
        if "not_built" in entry:
            lines.append(f"| {entry['class']} | | | not built: {_cell(entry['not_built'])} |")
        elif "refused" in entry:
            lines.append(f"| {entry['class']} | `{entry['family']}` | | refused: {_cell(entry['refused'])} |")
        else:
            unknown = ", ".join(f"`{pattern}`" for pattern in entry["unknown"])
            share = f"{100 * entry['share']:.0f} %"
            lines.append(f"| {entry['class']} | `{entry['family']}` | {share} | {unknown} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    main()
