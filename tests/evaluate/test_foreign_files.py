"""Small files of others: a pipe, a file of 10 GB or one that is not there gives one sentence, at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.calibrate.samples import make_samples
from halfbyte.calibration import read_importance
from halfbyte.calibration.statistics import DESCRIPTION_FILE, Statistics
from halfbyte.demo import MODEL
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.conversations import read_conversations
from halfbyte.evaluate.results import provenance_of
from halfbyte.evaluate.sensitivity_file import read_sensitivity
from halfbyte.evaluate.tasks import read_questions
from halfbyte.evaluate.text import tokens_of
from halfbyte.report.read import read_document
from halfbyte.report.source_card import read_front_matter
from halfbyte.runtime.loading import load_tokenizer

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "imatrix.dat": ("imatrix.dat", read_importance),
    "imatrix.gguf": ("imatrix.gguf", read_importance),
    "importance": ("importance.safetensors", read_importance),
    "statistics": (DESCRIPTION_FILE, lambda path: Statistics(path.parent)),
    "sensitivity": ("s.jsonl", read_sensitivity),
    "results": ("results.json", read_document),
    "results in lines": ("results.jsonl", read_document),
    "card": ("README.md", read_front_matter),
    "conversations": ("chats.json", read_conversations),
    "questions": ("questions.jsonl", read_questions),
    "text": ("text.txt", lambda path: tokens_of(path, load_tokenizer(MODEL), None)),
    "calibration text": ("text.txt", lambda path: make_samples([path], load_tokenizer(MODEL), 1, 8)),
}


def sentence_of(read: Callable[[Path], Any], path: Path) -> str:
    """What the reader says, within two seconds."""
    began = time.process_time()
    with pytest.raises(HalfbyteError) as caught:
        read(path)
    assert time.process_time() - began < 2
    text = str(caught.value)
    assert ("\n" not in text and path.name in text) or path.parent.name in text
    return text


@pytest.mark.parametrize("kind", READERS)
def test_a_pipe_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    name, read = READERS[kind]
    os.mkfifo(tmp_path / name)
    assert "regular file" in (text := sentence_of(read, tmp_path / name)) or "is no file" in text


@pytest.mark.parametrize("kind", READERS)
def test_ten_gigabytes_are_not_read(kind: str, tmp_path: Path) -> None:
    name, read = READERS[kind]
    with (tmp_path / name).open("wb") as file:
        file.write(b"GGUF" if name.endswith(".gguf") else b"")
        file.truncate(10_000_000_000)
    sentence_of(read, tmp_path / name)


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_is_not_there_is_named(kind: str, tmp_path: Path) -> None:
    name, read = READERS[kind]
    sentence_of(read, tmp_path / name)


@pytest.mark.parametrize("content", ["[]", '{"recipe": []}', '{"recipe": {"name": [1]}}', "{", "nothing"])
def test_what_an_output_was_made_of_is_not_known_from_a_damaged_file(content: str, tmp_path: Path) -> None:
    from halfbyte.evaluate.results import _recipe

    (tmp_path / "halfbyte.json").write_text(content)
    assert _recipe(provenance_of(tmp_path)) is None
