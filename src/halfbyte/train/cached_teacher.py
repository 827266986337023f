"""A teacher whose answers were written down: it need not be in memory while its student is trained."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from halfbyte.checkpoint import write_file_atomic
from halfbyte.errors import HalfbyteError
from halfbyte.train.objectives import Teacher, TopK, likeliest

_INDEX, _IDS, _LOG_PROBS = "index.json", "ids.i32", "log_probs.f32"


class CachedTeacher:
    """The likeliest tokens of a teacher for sequences that it has seen, from the folder that ``write`` filled.

    Sequences are known by their tokens. HalfbyteError for a folder without them, or a sequence that is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / _INDEX).read_text())
            self.rows: dict[str, int] = about["rows"]
            self.shape: tuple[int, ...] = (len(self.rows), *about["shape"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HalfbyteError(
                f"{folder} holds no answers of a teacher; write them with CachedTeacher.write"
            ) from error
        self._ids = np.memmap(self.folder / _IDS, np.int32, "r", shape=self.shape)
        self._log_probs = np.memmap(self.folder / _LOG_PROBS, np.float32, "r", shape=self.shape)

    @staticmethod
    def is_folder(path: str | Path) -> bool:
        """Whether a folder holds the answers of a teacher."""
        return (Path(path) / _INDEX).is_file() and (Path(path) / _LOG_PROBS).is_file()

    @classmethod
    def write(cls, teacher: Teacher, sequences: torch.Tensor, folder: str | Path, top_k: int = 256) -> CachedTeacher:
        """Ask a teacher about sequences [count, length], one by one, and keep its ``top_k`` likeliest tokens."""
        rows = {_key(sequence): row for row, sequence in enumerate(sequences)}
        if len(rows) < len(sequences):
            raise HalfbyteError("the sequences for a cached teacher repeat; give each one once")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shape: list[int] = []
        with open(folder / _IDS, "wb") as ids, open(folder / _LOG_PROBS, "wb") as log_probs:
            for sequence in sequences:
                answer = teacher(sequence[None])
                top = answer if isinstance(answer, TopK) else likeliest(answer, top_k)
                ids.write(top.ids[0].to("cpu", torch.int32).contiguous().numpy().tobytes())
                log_probs.write(top.log_probs[0].to("cpu", torch.float32).contiguous().numpy().tobytes())
                shape = list(top.ids.shape[1:])
        write_file_atomic(folder / _INDEX, json.dumps({"shape": shape, "rows": rows}).encode())
        return cls(folder)

    def __call__(self, ids: torch.Tensor) -> TopK:
        """What the teacher said of each sequence of a batch."""
        try:
            rows = [self.rows[_key(sequence)] for sequence in ids]
        except KeyError:
            raise HalfbyteError(
                f"{self.folder} lacks the teacher's answer to a sequence of this text; write it for the same text, "
                "length and seed"
            ) from None
        top, log_probs = (torch.from_numpy(np.array(array[rows])) for array in (self._ids, self._log_probs))
        return TopK(top.long().to(ids.device), log_probs.to(ids.device))


def _key(sequence: torch.Tensor) -> str:
    return hashlib.sha256(sequence.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()[:32]
