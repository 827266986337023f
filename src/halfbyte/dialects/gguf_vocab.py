"""The tokenizer of a GGUF file, from tokenizer.json.

llama.cpp splits text by rules of its own, and ``tokenizer.ggml.pre`` names them. Which name fits is read off the
pre-tokenizer that tokenizer.json states, whatever the vocabulary; a pre-tokenizer that is not known here is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from halfbyte.checkpoint import Inventory
from halfbyte.dialects.gguf_metadata import rows_of
from halfbyte.dialects.gguf_models import library
from halfbyte.errors import PlanError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(letters: str, digits: str, others: str) -> str:
    return f"{letters}|{digits}|{others}|{_SPACES}"


def _plain(digits: str) -> str:
    letters = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
    return _words(letters, digits, r" ?[^\s\p{L}\p{N}]+[\r\n]*")


def _cased(contractions: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    letters = f"{start}{_UPPER}*{_LOWER}+{contractions}|{start}{_UPPER}+{_LOWER}*{contractions}"
    return _words(letters, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*")


_SPLITS = {
    _plain(r"\p{N}"): "qwen2",
    _plain(r"\p{N}{1,3}"): "llama-bpe",
    _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"): "gpt-4o",
    _cased("", r"\p{N}"): "tekken",
}
"""Regular expressions that split text before byte-level BPE, and llama.cpp's name for them."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(writer: Any, inventory: Inventory) -> None:
    """Tokens, merges or scores, special tokens and the chat template; PlanError for a tokenizer that is not known."""
    gguf = library()
    assert inventory.root is not None
    path = inventory.root / "tokenizer.json"
    if not path.is_file():
        raise PlanError(
            f"{inventory.source} has no tokenizer.json, which a GGUF file must hold; save the tokenizer with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        table = json.loads(path.read_bytes())
        model, added = table["model"], table.get("added_tokens") or []
        tokens = {int(i): str(text) for text, i in model["vocab"].items()}
        tokens |= {int(a["id"]): str(a["content"]) for a in added}
        specials = {int(a["id"]): bool(a.get("special")) for a in added}
        pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"tokenizer.json of {inventory.source} is no BPE tokenizer, which GGUF needs here") from error
    if model.get("type", "BPE") != "BPE":
        raise PlanError(f"the tokenizer of {inventory.source} is {model['type']}; GGUF is written for BPE tokenizers")
    count = rows_of(inventory, "model.embed_tokens.weight")
    if tokens and max(tokens) >= count:
        raise PlanError(f"the tokenizer of {inventory.source} has more tokens than the embedding has rows ({count})")
    sentencepiece = bool(model.get("byte_fallback")) and not _has_bytes(table)
    texts, types = [], []
    for i in range(count):
        text = tokens.get(i)
        texts.append(f"[PAD{i}]" if text is None else text)
        types.append(_type(gguf.TokenType, i, text, specials, model.get("unk_token") if sentencepiece else None))
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(texts)
        writer.add_token_scores(_scores(texts, pairs))
        writer.add_add_space_prefix(_prefix(table))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(table, inventory.source))
        writer.add_token_list(texts)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(inventory.root, load_merges=not sentencepiece, n_vocab=count)
    special.add_to_gguf(writer, quiet=True)
    # what llama.cpp assumes where nothing is said depends on the kind of tokenizer
    for which in ("bos", "eos"):
        if f"tokenizer.ggml.add_{which}_token" not in writer.kv_data[0]:
            getattr(writer, f"add_add_{which}_token")(False)


def pre_tokenizer(table: Mapping[str, Any], source: str) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer splits text; PlanError if it has none."""
    steps = _steps(table.get("pre_tokenizer"))
    kinds = [step.get("type") for step in steps]
    known = None
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0].get("pattern") or {}
        if steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            known = _SPLITS.get(pattern.get("Regex", ""))
    elif kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        known = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        known = "smollm"
    if known == "llama-bpe" and not table["model"].get("ignore_merges"):
        # the same rules, but words that are tokens are still put together by merges
        known = "smaug-bpe"
    if known is None:
        raise PlanError(
            f"the tokenizer of {source} splits text in a way that is not known for llama.cpp; known are the "
            f"pre-tokenizers called {', '.join([*_SPLITS.values(), 'smaug-bpe', 'gpt-2', 'smollm'])} there"
        )
    return known


def tokenizer_remarks(inventory: Inventory) -> list[str]:
    """Where llama.cpp may split text into other tokens."""
    assert inventory.root is not None
    table = json.loads((inventory.root / "tokenizer.json").read_bytes())
    kinds = [step.get("type") for step in _steps(table.get("normalizer"), "normalizers")]
    form = next((kind for kind in kinds if kind in ("NFC", "NFD", "NFKC", "NFKD")), None)
    if form is None:
        return []
    return [f"the tokenizer brings text into the form {form} and llama.cpp does not: other text may get other tokens"]


def _steps(part: Any, inner: str = "pretokenizers") -> list[dict[str, Any]]:
    if not part:
        return []
    return list(part[inner]) if part.get("type") == "Sequence" else [part]


def _has_bytes(table: Mapping[str, Any]) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(table.get("pre_tokenizer")))


def _prefix(table: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    for step in (*_steps(table.get("normalizer"), "normalizers"), *_steps(table.get("pre_tokenizer"))):
        if step.get("type") == "Prepend":
            return True
        if step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False


def _type(types: Any, number: int, text: str | None, specials: Mapping[int, bool], unknown: str | None) -> int:
    if text is None:
        return int(types.UNUSED)
    if unknown is not None and text == unknown:
        return int(types.UNKNOWN)
    if number in specials:
        # some models mark such tokens as ordinary ones
        control = specials[number] or (text.startswith("<|") and text.endswith("|>"))
        return int(types.CONTROL if control else types.USER_DEFINED)
    if unknown is not None and _BYTE.fullmatch(text):
        return int(types.BYTE)
    return int(types.NORMAL)


def _scores(texts: list[str], pairs: list[tuple[str, ...]]) -> list[float]:
    """SentencePiece joins the pair with the highest score: a token's is the rank of the merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    last = len(pairs)
    return [-float(ranks.get(text, last)) for text in texts]
