"""The text and the tokenizer of the demo model: what every Python installation carries.

The documentation topics of ``pydoc_data``, of which a fixed part is held out, and the docstrings of the
standard library's own sources.  The result depends only on the Python version.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics as pydoc_topics

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

END = "<|endoftext|>"  # token 0: stands before every training text
TOPICS: dict[str, str] = pydoc_topics.topics
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
HELD_FROM, HELD_EVERY = 2, 4


def _paragraphs(text: str) -> list[tuple[str, str]]:
    """Pairs of (paragraph, its words joined by single spaces): the key finds repeats despite line breaks."""
    return [(part, " ".join(part.split())) for part in text.split("\n\n") if part.strip()]


def _docstrings_of(source: str) -> Iterator[str]:
    """The docstrings of one source file, each under its signature and indented as the topics do it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        if isinstance(node, ast.Module):
            yield text
            continue
        is_class = isinstance(node, ast.ClassDef)
        title = f"class {node.name}" if is_class else f"{node.name}({ast.unparse(node.args)})"
        indented = "\n".join(f"   {line}" if line else line for line in text.splitlines())
        yield f"{title}\n\n{indented}"


def _library_docstrings() -> Iterator[str]:
    """One text per source file of the standard library that has docstrings, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in sorted(sys.stdlib_module_names):
        folder = root / module
        for file in sorted(folder.rglob("*.py")) if folder.is_dir() else [root / f"{module}.py"]:
            if file.is_file() and not SKIPPED & set(file.relative_to(root).parts):
                text = "\n\n".join(_docstrings_of(file.read_text(encoding="utf-8")))
                if text:
                    yield text


def _held_out_names() -> list[str]:
    """Every fourth of the topics of 1,000 characters or more that are at least three quarters their own.

    (Topics repeat each other's sections: ``customization`` lies in ``specialnames``, ``if`` in ``compound``.)
    """
    owners: dict[str, set[str]] = {}
    for name, text in TOPICS.items():
        for _, key in _paragraphs(text):
            owners.setdefault(key, set()).add(name)

    def own_part(text: str) -> float:
        return sum(len(part) for part, key in _paragraphs(text) if len(owners[key]) == 1) / len(text)

    eligible = [name for name, text in sorted(TOPICS.items()) if len(text) >= 1000 and own_part(text) >= 0.75]
    return eligible[HELD_FROM::HELD_EVERY]


def corpus() -> tuple[list[str], list[str], str, list[str]]:
    """Split the text: (topics to train on, docstrings to train on, held-out text, names of held-out topics).

    A paragraph is used once, and one that the held-out text has is never trained on.
    """
    seen: set[str] = set()

    def unique(texts: list[str]) -> list[str]:
        kept = []
        for text in texts:
            parts = []
            for part, key in _paragraphs(text):
                # short lines such as "Example:" may repeat; they carry nothing that leaks
                if len(key) < 40 or key not in seen:
                    parts.append(part)
                    seen.add(key)
            if sum(map(len, parts)) >= 100:
                kept.append("\n\n".join(parts))
        return kept

    held_names = _held_out_names()
    held = unique([TOPICS[name] for name in held_names])
    # shortest first: a section stays a text of its own and is left out of the collection that repeats it
    trained = sorted(TOPICS.keys() - held_names, key=lambda name: (len(TOPICS[name]), name))
    topics = unique([TOPICS[name] for name in trained])
    return topics, unique(list(_library_docstrings())), "\n\n\n".join(held), held_names


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with Qwen's own splitting, so that every reader of this architecture tokenizes alike."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def python_licence() -> str:
    """The Python Software Foundation licence that the standard library carries."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt").read_text(encoding="utf-8")
    start = text.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2")
    return text[start : text.index("BEOPEN.COM LICENSE AGREEMENT", start)].strip() + "\n"
