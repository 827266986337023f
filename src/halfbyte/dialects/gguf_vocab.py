"""The tokenizer of a GGUF file, from tokenizer.json.

llama.cpp splits text by rules of its own, and ``tokenizer.ggml.pre`` names them. Which name fits is read off the
pre-tokenizer that tokenizer.json states, whatever the vocabulary; a pre-tokenizer that is not known here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from halfbyte.checkpoint import Inventory
from halfbyte.checkpoint.foreign import Fields
from halfbyte.dialects.gguf_metadata import rows_of
from halfbyte.dialects.gguf_models import library
from halfbyte.dialects.gguf_source import read_tokenizer
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


def add_tokenizer(writer: Any, inventory: Inventory, table: Fields) -> None:
    """Tokens, merges or scores, special tokens and the chat template; PlanError for a tokenizer that is not known."""
    gguf = library()
    model = table.fields("model")
    if model.text("type", "BPE") != "BPE":
        kind = model.text("type")[:80]
        raise PlanError(f"the tokenizer of {inventory.source} is {kind}; GGUF is written for BPE tokenizers")
    tokens, specials = _tokens(table)
    pairs = _pairs(model)
    count = rows_of(inventory, "model.embed_tokens.weight")
    if tokens and max(tokens) >= count:
        raise PlanError(f"the tokenizer of {inventory.source} has more tokens than the embedding has rows ({count})")
    sentencepiece = model.flag("byte_fallback") and not _has_bytes(table)
    texts, types = [], []
    for i in range(count):
        text = tokens.get(i)
        texts.append(f"[PAD{i}]" if text is None else text)
        types.append(_type(gguf.TokenType, i, text, specials, model.text("unk_token") if sentencepiece else None))
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
    special = gguf.SpecialVocab(inventory.store.folder(), load_merges=not sentencepiece, n_vocab=count)
    special.add_to_gguf(writer, quiet=True)
    # what llama.cpp assumes where nothing is said depends on the kind of tokenizer
    for which in ("bos", "eos"):
        if f"tokenizer.ggml.add_{which}_token" not in writer.kv_data[0]:
            getattr(writer, f"add_add_{which}_token")(False)


def _tokens(table: Fields) -> tuple[dict[int, str], dict[int, bool]]:
    """Texts by number, and which of the added ones are special."""
    vocabulary = table.fields("model").fields("vocab")
    numbers = {text: vocabulary.count(text) for text in vocabulary.values}
    if not numbers or None in numbers.values():
        raise PlanError(
            f"{table.file} is no BPE tokenizer, which GGUF needs here: it has no vocabulary that numbers its tokens"
        )
    tokens = {number: text for text, number in numbers.items() if number is not None}
    specials: dict[int, bool] = {}
    for added in table.objects("added_tokens"):
        number = added.count("id")
        if number is None or "content" not in added:
            raise PlanError(f"{added.path} in {table.file} has no id or no content")
        tokens[number], specials[number] = added.text("content"), added.flag("special")
    return tokens, specials


def _pairs(model: Fields) -> list[tuple[str, ...]]:
    """The merges, which are "a b" or ["a", "b"]."""
    merges = model.values.get("merges")
    if merges is None:
        return []
    if not isinstance(merges, list):
        raise model.wrong("merges", "a list of pairs")
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else m for m in merges]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise model.wrong("merges", "a list of pairs")
    return [tuple(pair) for pair in pairs]


def pre_tokenizer(table: Fields, source: str) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer splits text; PlanError if it has none."""
    steps = _steps(table.fields("pre_tokenizer"))
    kinds = [step.text("type") for step in steps]
    known = None
    if kinds == ["Split", "ByteLevel"] and not steps[1].flag("use_regex", True):
        if steps[0].text("behavior") == "Isolated" and not steps[0].flag("invert"):
            known = _SPLITS.get(steps[0].fields("pattern").text("Regex"))
    elif kinds == ["ByteLevel"] and steps[0].flag("use_regex", True) and not steps[0].flag("add_prefix_space"):
        known = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0].flag("individual_digits") and steps[1].flag("use_regex", True):
        known = "smollm"
    if known == "llama-bpe" and not table.fields("model").flag("ignore_merges"):
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
    kinds = [step.text("type") for step in _steps(read_tokenizer(inventory).fields("normalizer"), "normalizers")]
    form = next((kind for kind in kinds if kind in ("NFC", "NFD", "NFKC", "NFKD")), None)
    if form is None:
        return []
    return [f"the tokenizer brings text into the form {form} and llama.cpp does not: other text may get other tokens"]


def _steps(part: Fields, inner: str = "pretokenizers") -> list[Fields]:
    if not part:
        return []
    return part.objects(inner) if part.text("type") == "Sequence" else [part]


def _has_bytes(table: Fields) -> bool:
    return any(step.text("type") == "ByteLevel" for step in _steps(table.fields("pre_tokenizer")))


def _prefix(table: Fields) -> bool:
    """Whether a space is put before the text."""
    for step in (*_steps(table.fields("normalizer"), "normalizers"), *_steps(table.fields("pre_tokenizer"))):
        if step.text("type") == "Prepend":
            return True
        if step.text("type") == "Metaspace":
            return step.text("prepend_scheme", "always") != "never"
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
