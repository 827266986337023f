"""The state of an unfinished training on disk: written whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint.files import reason
from halfbyte.checkpoint.writer import sync_folder
from halfbyte.errors import OutputError

_STATE, _PARTIAL = "state.pt", "state.partial"


class TrainingState:
    """A folder with the last saved state of one training, which ``fingerprint`` names.

    OutputError where the folder cannot be used, or holds a training when none is to be continued, or another one.
    """

    def __init__(self, folder: str | Path, fingerprint: str, resume: bool) -> None:
        self.folder, self.fingerprint = Path(folder), fingerprint
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"the folder {folder} cannot be used ({reason(error)})") from error
        if (self.folder / _STATE).is_file() and not resume:
            raise OutputError(f"{folder} holds an unfinished training; continue it with --resume, or remove the folder")

    def load(self) -> dict[str, Any] | None:
        """The last state, None where there is none yet."""
        path = self.folder / _STATE
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            fingerprint = state.pop("fingerprint")
        except Exception as error:  # torch has errors of many kinds for a damaged file
            raise OutputError(f"{path} cannot be read; remove {self.folder} to start anew") from error
        if fingerprint != self.fingerprint:
            raise OutputError(
                f"{self.folder} holds another training (start, text or options differ); remove it to start anew"
            )
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state; whoever is killed meanwhile leaves the one before."""
        partial = self.folder / _PARTIAL
        try:
            with open(partial, "wb") as file:
                torch.save({**state, "fingerprint": self.fingerprint}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / _STATE)
            sync_folder(self.folder)
        except (OSError, RuntimeError) as error:
            raise OutputError(f"the state of the training cannot be written to {self.folder} ({error})") from error

    def finish(self) -> None:
        """The training is complete: remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
