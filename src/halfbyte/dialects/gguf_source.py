"""The files of a source that the library gguf opens by itself: looked at first, and its errors in one sentence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.checkpoint import Inventory
from halfbyte.checkpoint.files import parse_object, read_small, reason
from halfbyte.checkpoint.foreign import Fields, check_plain
from halfbyte.errors import CheckpointError, HalfbyteError, PlanError
from halfbyte.models.strict_yaml import check_yaml

TOKENIZER = "tokenizer.json"
_JSON = (TOKENIZER, "config.json", "tokenizer_config.json", "generation_config.json", "chat_template.json")
_TEXT = ("merges.txt", "chat_template.jinja")
_CARD, _CARD_BYTES = "README.md", 2_000_000


@contextmanager
def library_reads(inventory: Inventory) -> Iterator[None]:
    """Let the library read a source's folder; PlanError or CheckpointError for files that it cannot digest."""
    _check_files(inventory.store.folder())
    logging.getLogger("gguf").setLevel(logging.ERROR)
    try:
        yield
    except HalfbyteError:
        raise
    except Exception as error:  # the library checks no types: a wrong one ends in any exception
        raise PlanError(
            f"the tokenizer or the configuration files of {inventory.source} do not fit a GGUF file: the library gguf "
            f"stops with {type(error).__name__}: {reason(error)[:200]}"
        ) from error


def read_tokenizer(inventory: Inventory) -> Fields:
    """tokenizer.json by type; PlanError where there is none."""
    path = inventory.store.folder() / TOKENIZER
    if not path.is_file():
        raise PlanError(
            f"{inventory.source} has no tokenizer.json, which a GGUF file must hold; save the tokenizer with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    where = f"{TOKENIZER} of {inventory.source}"
    try:
        return Fields(_plain_object(path, where), where)
    except CheckpointError as error:
        raise PlanError(f"{where} is no BPE tokenizer, which GGUF needs here: {error}") from error


def _check_files(root: Path) -> None:
    for name in _JSON:
        if (root / name).exists():
            _plain_object(root / name, str(root / name))
    templates = root / "additional_chat_templates"
    for path in (*(root / name for name in _TEXT), *(sorted(templates.glob("*.jinja")) if templates.is_dir() else ())):
        if path.exists():
            _text(path)
    if (root / _CARD).exists():
        _check_card(root / _CARD)


def _plain_object(path: Path, where: str) -> dict[str, object]:
    content = parse_object(read_small(path), where, strict=False)
    check_plain(content, where)
    return content


def _check_card(path: Path) -> None:
    """Refuse front matter that takes YAML's parser too long or too deep."""
    head, _, rest = _text(path, _CARD_BYTES).partition("\n")
    if head.rstrip() != "---":
        return
    lines = rest.splitlines()
    end = next((i for i, line in enumerate(lines) if line == "---"), len(lines))
    try:
        check_yaml("\n".join(lines[:end]).replace("\t", "  "))
    except ValueError as error:
        raise PlanError(f"the front matter of {path} cannot be read ({error}); repair or remove it") from error


def _text(path: Path, most: int | None = None) -> str:
    try:
        return (read_small(path) if most is None else read_small(path, most)).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start})") from error
