"""What of a model is there: parts that its configuration promises, files, and what the ignore list makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from halfbyte.audit.finding import Finding, Severity, count, some, verb
from halfbyte.checkpoint.config import parts_of, text_parts
from halfbyte.dialects.declared import Declared
from halfbyte.dialects.modules import is_linear, modules
from halfbyte.models import Weight
from halfbyte.models.regex import REGEX
from halfbyte.models.roles import LINEAR, bare_role, is_under
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.unread import likely_method, unread_codes, unread_method

_MTP = ("mtp_num_hidden_layers", "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_TOWERS = {"vision_config": "vision", "audio_config": "audio"}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "tiktoken.model")
# a share of the matrices' parameters that nobody leaves in 16 bits without saying so
_LARGE = 0.05
# roles that engines do not take for Linear modules of their own
_NO_LINEAR = ("embedding", "position", "router", "shared_expert_gate", "per_layer.embedding")


def check_structure(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Findings that headers and configuration show."""
    yield from _unread(checkpoint)
    yield from _parts(checkpoint)
    yield from _layers(checkpoint)
    yield from _files(checkpoint)
    if checkpoint.dialect is not None:
        yield from _unquantized(checkpoint)
        claims = checkpoint.dialect.declared(checkpoint.inventory)
        if claims is not None:
            yield from _claims(checkpoint, claims)
        yield from _groups(checkpoint)


def _unread(checkpoint: Checkpoint) -> Iterator[Finding]:
    if method := unread_method(checkpoint):
        yield Finding(
            "note", "foreign-method", f"it is quantized by {method[:60]!r}, whose weights halfbyte cannot read"
        )
    codes = tuple(weight.name for weight in unread_codes(checkpoint))
    if codes and checkpoint.dialect is None and not method:
        what = "config.json has no quantization_config, so engines take packed codes for weights"
        likely = likely_method(checkpoint)
        yield Finding("wrong", "no-configuration", what, codes, f"they look like those of {likely}" if likely else "")
    elif codes and checkpoint.dialect is not None:
        fused = any(name.endswith(("_packed", "_scale", "_shape")) and ".experts." in name for name in codes)
        yield Finding(
            "wrong",
            "unmapped-codes",
            f"{count(len(codes), 'tensor')} of codes and scales {verb(len(codes), 'have')} names that no engine of "
            f"{checkpoint.dialect.name} looks for: {some(codes)}",
            codes,
            "quantize the model again with a tool that writes experts one by one" if fused else "",
            ("vllm-project/llm-compressor#2939",) if fused else (),
        )


def _parts(checkpoint: Checkpoint) -> Iterator[Finding]:
    roles = {weight.role.removeprefix("quantized.") for weight in checkpoint.weights}
    promised = _first_count(checkpoint.inventory.config, _MTP)
    if promised and not any(role.startswith("mtp.") for role in roles):
        yield Finding(
            "missing",
            "mtp-missing",
            f"config.json promises {count(promised, 'layer')} that {verb(promised, 'predict')} further tokens (MTP) "
            "and the files hold none, so engines cannot draft with this model",
            advice="`halfbyte repair` takes them from the source",
            seen=("NVIDIA/Model-Optimizer#860",),
        )
    for place, part in parts_of(checkpoint.inventory.config):
        for key, tower in _TOWERS.items():
            if isinstance(part.get(key), dict) and part[key] and not any(r.startswith(f"{tower}.") for r in roles):
                where = f" ({place})" if place else ""
                yield Finding(
                    "missing",
                    f"{tower}-missing",
                    f"config.json has a {key}{where} and the files hold no {tower} tower, so multimodal classes fill "
                    "it with random numbers or do not load",
                    advice="`halfbyte repair` takes it from the source; or use the text-only configuration",
                )


def _layers(checkpoint: Checkpoint) -> Iterator[Finding]:
    stated = _first_count(checkpoint.inventory.config, ("num_hidden_layers", "n_layer", "num_layers"))
    main = [w for w in checkpoint.weights if w.layer is not None and not _beside(w)]
    present = {w.layer for w in main}
    if stated and present:
        gone = [str(n) for n in range(stated) if n not in present]
        if gone:
            what = f"config.json has {stated} layers and the files lack {count(len(gone), 'layer')}: {some(gone, 8)}"
            yield Finding("missing", "layers-missing", what)
    experts = _first_count(checkpoint.inventory.config, _EXPERTS)
    fewer = [
        w for w in main if len(w.shape) == 3 and is_under(bare_role(w.role), "experts") and w.shape[0] < (experts or 0)
    ]
    if fewer:
        what = f"{fewer[0].name} holds {fewer[0].shape[0]} experts and config.json promises {experts}"
        yield Finding("missing", "experts-missing", what, tuple(w.name for w in fewer))


def _files(checkpoint: Checkpoint) -> Iterator[Finding]:
    inventory = checkpoint.inventory
    if inventory.root is None or inventory.ggml_types:
        return
    if inventory.side_files and not any(name in inventory.side_files for name in _TOKENIZERS):
        yield Finding(
            "missing",
            "tokenizer-missing",
            "there is no tokenizer beside the weights",
            (),
            "`halfbyte repair` takes its files from the source",
        )
    index = inventory.root / "model.safetensors.index.json"
    if index.is_file() and "model.safetensors" in inventory.files and len(inventory.files) > 1:
        yield Finding(
            "wrong",
            "bare-file-beside-index",
            "model.safetensors lies beside an index that names further files; loaders prefer the one file and never "
            "look at the others",
            advice="rename model.safetensors and name it so in the index",
        )


def _unquantized(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Large matrices that are as wide as in the source, by kind."""
    total = sum(math.prod(w.shape) for w in checkpoint.weights if len(w.shape) > 1) or 1
    kept: dict[str, list[Weight]] = {}
    for weight in checkpoint.weights:
        role = weight.role.removeprefix("quantized.")
        if weight.name not in checkpoint.formats and any(is_under(role, prefix) for prefix in LINEAR):
            kept.setdefault(role.split(".")[0], []).append(weight)
    for kind, weights in kept.items():
        share = sum(math.prod(w.shape) for w in weights) / total
        if share >= _LARGE:
            what = (
                f"{count(len(weights), 'matrix')} of {kind} ({share:.0%} of all "
                f"parameters in matrices) {verb(len(weights), 'are')} not quantized"
            )
            severity: Severity = "poor" if kind == "experts" else "note"
            seen = ("vllm-project/llm-compressor#2060",) if kind == "experts" else ()
            yield Finding(severity, "left-wide", what, tuple(w.name for w in weights), seen=seen)


def _claims(checkpoint: Checkpoint, claims: Declared) -> Iterator[Finding]:
    quantized: list[str] = []
    wide: list[str] = []
    for weight in checkpoint.weights:
        if not is_linear(weight) or any(is_under(bare_role(weight.role), role) for role in _NO_LINEAR):
            continue
        names = [module.name for module in modules(weight)]
        (quantized if weight.name in checkpoint.formats else wide).extend(names)
    unexpected = tuple(name for name in quantized if not claims.quantizes(name))
    if unexpected:
        yield Finding(
            "wrong",
            "ignored-but-quantized",
            f"{count(len(unexpected), 'module')} {verb(len(unexpected), 'hold')} codes and the configuration says "
            f"that they are not quantized, so engines do not load them: {some(unexpected)}",
            unexpected,
            "`halfbyte repair` corrects the ignore list",
        )
    expected = tuple(name for name in wide if claims.quantizes(name) and not name.startswith("mtp."))
    drafts = tuple(name for name in wide if claims.quantizes(name) and name.startswith("mtp."))
    for waiting, code, who in (
        (expected, "wide-but-not-ignored", "engines"),
        (drafts, "mtp-not-ignored", "draft models"),
    ):
        if waiting:
            yield Finding(
                "wrong",
                code,
                f"{count(len(waiting), 'module')} {verb(len(waiting), 'are')} not quantized and the ignore list does "
                f"not name them, so {who} wait for codes and scales that are not there: {some(waiting)}",
                waiting,
                "`halfbyte repair` corrects the ignore list",
                ("vllm-project/vllm#41994",) if code == "mtp-not-ignored" else (),
            )
    yield from _entries(checkpoint, claims, [*quantized, *wide])


def _entries(checkpoint: Checkpoint, claims: Declared, names: Sequence[str]) -> Iterator[Finding]:
    """Entries of the ignore list that match nothing here, or nothing once an engine renames modules."""
    every = [*names, *(w.name.removesuffix(".weight") for w in checkpoint.weights)]
    idle = tuple(e for e in claims.entries if not any(claims.entry_matches(e, name) for name in every))
    if idle:
        what = f"{count(len(idle), 'entry')} of the ignore list {verb(len(idle), 'match')} nothing: {some(idle)}"
        yield Finding("note", "ignore-matches-nothing", what, idle)
    composite = any("text_config" in part for _, part in parts_of(checkpoint.inventory.config))
    fixed = tuple(
        e
        for e in claims.entries
        if composite and e.startswith((f"{REGEX}model\\.language", f"{REGEX}^model\\.language"))
    )
    if fixed:
        yield Finding(
            "wrong",
            "ignore-anchored",
            f"expressions of the ignore list begin at model.language_model ({some(fixed)}); vLLM renames that prefix "
            "and matches expressions from the beginning of the new name, so they match nothing there",
            fixed,
            "begin them with `.*`",
        )


def _groups(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Matrices that engines fuse must be quantized alike."""
    groups: dict[str, list[Weight]] = {}
    for weight in checkpoint.weights:
        if weight.group is not None:
            groups.setdefault(weight.group, []).append(weight)
    for weights in groups.values():
        formats = {checkpoint.formats[w.name].name if w.name in checkpoint.formats else w.dtype for w in weights}
        if len(formats) > 1:
            names = tuple(w.name for w in weights)
            what = f"engines fuse {some(names)}, and they are in different formats ({', '.join(sorted(formats))})"
            yield Finding("wrong", "fused-unlike", what, names)


def _beside(weight: Weight) -> bool:
    return weight.role.removeprefix("quantized.").startswith(("mtp.", "vision.", "audio."))


def _first_count(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    """The first positive whole number under one of some keys, of the language model."""
    for part in text_parts(config):
        for key in keys:
            if type(part.get(key)) is int and part[key] > 0:
                return int(part[key])
    return 0
