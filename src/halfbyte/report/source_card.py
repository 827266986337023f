"""What the source's own model card says: its licence and language. Nothing is guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.checkpoint.files import read_small
from halfbyte.report.private_paths import HUB_ID
from halfbyte.report.read import ReportError

README = "README.md"
KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Front matter that a quantized checkpoint inherits."""


def inherited(out: Path, source: str | None, revision: str | None = None) -> dict[str, Any]:
    """KEYS as the card of ``source`` states them (a folder, or a hub id, whose card is fetched).

    Without a source, as README.md in ``out`` does: the source's, which the conversion copied, or halfbyte's, which has
    taken them over. {} where there is no card; ReportError where it cannot be read.
    """
    path = _find(out, source, revision)
    return {} if path is None else read_front_matter(path)


def read_front_matter(path: Path) -> dict[str, Any]:
    """KEYS of a card on disk."""
    from huggingface_hub import ModelCard

    try:
        text = read_small(path).decode()
        # without front matter the library complains aloud
        data: dict[str, Any] = ModelCard(text).data.to_dict() if text.startswith("---") else {}  # type: ignore[no-untyped-call]
    except Exception as error:  # YAML, encoding and the hub's own checks each have their type
        raise ReportError(f"the front matter of {path} cannot be read: {error}") from error
    return {key: data[key] for key in KEYS if data.get(key)}


def _find(out: Path, source: str | None, revision: str | None) -> Path | None:
    folder = out if source is None else Path(source).expanduser()
    if folder.is_dir():
        return folder / README if (folder / README).is_file() else None
    if source is None or not HUB_ID.fullmatch(source):
        raise ReportError(f"{source!r} is neither a folder nor a hub id of the form owner/name")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, README, revision=revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise ReportError(f"the card of {source} is not in the cache and cannot be fetched: {error}") from error
        return None
    except Exception as error:  # network, permission, validation
        raise ReportError(f"the card of {source} cannot be fetched: {error}") from error
