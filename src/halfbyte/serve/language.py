"""The language of a text, by its script and, within the Latin one, by its most frequent words.

Enough to tell prompts apart for a routing rule; it claims nothing about texts of a few words.
"""

from __future__ import annotations

import re
from collections import Counter

LONGEST = 2_000
"""Characters that are looked at."""
_SCRIPTS = (
    ("ja", "\u3040-\u30ff"),
    ("ko", "\uac00-\ud7af\u1100-\u11ff"),
    ("zh", "\u3400-\u4dbf\u4e00-\u9fff"),
    ("ru", "\u0400-\u04ff"),
    ("ar", "\u0600-\u06ff"),
    ("he", "\u0590-\u05ff"),
    ("el", "\u0370-\u03ff"),
    ("hi", "\u0900-\u097f"),
    ("th", "\u0e00-\u0e7f"),
)
_FREQUENT = {
    "en": "the of and to in is that it for was on are with as be this have from what how you",
    "de": "der die und das ist nicht ein eine zu mit den von auf für sich auch wie ich wir bitte",
    "fr": "le la les et des est une un dans que pour qui pas sur avec ce il nous vous comment",
    "es": "el los las y una que por con para es del se lo como más pero este qué cómo su",
    "it": "il lo gli e che di una per con non è del della sono come più questo nel mi cosa",
    "pt": "o os as e uma que para com não é do da em por mais como isso você são ao",
    "nl": "de het een en van ik is dat niet zijn voor op met je hoe wat aan ook maar dit",
}
LANGUAGES = (*(name for name, _ in _SCRIPTS), *_FREQUENT)
"""ISO 639-1 codes that ``language_of`` may return."""
_LETTERS = {name: re.compile(f"[{characters}]") for name, characters in _SCRIPTS}
_WORDS = {name: frozenset(words.split()) for name, words in _FREQUENT.items()}
_WORD = re.compile(r"[^\W\d_]+")


def language_of(text: str) -> str:
    """Return the ISO 639-1 code of a text's language, or an empty string where the text does not show it."""
    text = text[:LONGEST]
    letters = sum(character.isalpha() for character in text)
    if not letters:
        return ""
    counts = {name: len(pattern.findall(text)) for name, pattern in _LETTERS.items()}
    # Japanese mixes in Chinese characters, so a tenth of kana decides
    if counts["ja"] * 10 >= letters:
        return "ja"
    name = max(counts, key=lambda key: counts[key])
    # a letter of these scripts says as much as three of an alphabet beside it
    if counts[name] * 3 >= letters:
        return name
    words = Counter(_WORD.findall(text.lower()))
    hits = {name: sum(words[word] for word in frequent) for name, frequent in _WORDS.items()}
    best = max(hits, key=lambda key: hits[key])
    tied = sum(value == hits[best] for value in hits.values()) > 1
    return best if hits[best] and not tied else ""
