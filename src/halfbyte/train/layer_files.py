"""Finished layers of a local training on disk: codes and scales of each, and which are done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.checkpoint import numpy_dtype, write_file_atomic
from halfbyte.checkpoint.files import reason
from halfbyte.errors import OutputError
from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.runtime.packed import ARRAYS

_DONE = "layers.json"


class LayerFiles:
    """The folder of one local training, which ``fingerprint`` names; ``done`` layers, and ``errors`` of each.

    OutputError where the folder cannot be used, or holds a training when none is to be continued, or another one.
    """

    def __init__(self, folder: Path, fingerprint: str, resume: bool) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.errors: list[tuple[float, float]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            known = json.loads((folder / _DONE).read_text()) if (folder / _DONE).is_file() else None
        except (OSError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            raise OutputError(f"the folder {folder} cannot be used ({why}); remove it to start anew") from error
        if known is None:
            return
        if not resume:
            raise OutputError(f"{folder} holds an unfinished training; continue it with --resume, or remove the folder")
        if known.get("fingerprint") != fingerprint:
            raise OutputError(
                f"{folder} holds another training (start, text or options differ); remove it to start anew"
            )
        self.errors = [(first, last) for first, last in known["errors"]]

    @property
    def done(self) -> int:
        """How many layers are finished."""
        return len(self.errors)

    def write(self, number: int, tensors: Mapping[str, QuantizedTensor]) -> None:
        """Write the codes and scales of a layer; they count when ``finish_layer`` has said so."""
        arrays: dict[str, Any] = {}
        header = []
        for i, (name, tensor) in enumerate(tensors.items()):
            parts = {part: getattr(tensor, part) for part in ARRAYS if getattr(tensor, part) is not None}
            header.append(
                [name, tensor.format.name, tensor.shape, {p: [a.dtype.name, a.shape] for p, a in parts.items()}]
            )
            arrays |= {f"{i}.{p}": np.ascontiguousarray(a).reshape(-1).view(np.uint8) for p, a in parts.items()}
        path = self._path(number)
        partial = path.with_suffix(".partial")
        try:
            with open(partial, "wb") as file:
                np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({reason(error)})") from error

    def finish_layer(self, number: int, errors: tuple[float, float]) -> None:
        """Note that a layer is finished, durably."""
        self.errors = [*self.errors[:number], errors]
        content = {"fingerprint": self.fingerprint, "errors": self.errors}
        write_file_atomic(self.folder / _DONE, json.dumps(content).encode())

    def tensors(self) -> Mapping[str, QuantizedTensor]:
        """All weights of the finished layers, each read when it is asked for."""
        return _Lazy([self._path(number) for number in range(self.done)])

    def finish(self) -> None:
        """The training is complete: remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"layer-{number:04}.npz"


class _Lazy(Mapping[str, QuantizedTensor]):
    def __init__(self, paths: list[Path]) -> None:
        self._places: dict[str, tuple[Path, int, list[Any]]] = {}
        for path in paths:
            with np.load(path) as file:
                for i, entry in enumerate(json.loads(file["header"].tobytes())):
                    self._places[entry[0]] = path, i, entry

    def __getitem__(self, name: str) -> QuantizedTensor:
        path, i, (_, fmt, shape, parts) = self._places[name]
        with np.load(path) as file:
            arrays = {p: file[f"{i}.{p}"].view(_dtype(d)).reshape(s) for p, (d, s) in parts.items()}
        return QuantizedTensor(get_format(fmt), tuple(shape), **arrays)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _dtype(name: str) -> Any:
    return numpy_dtype("BF16") if name == "bfloat16" else np.dtype(name)
