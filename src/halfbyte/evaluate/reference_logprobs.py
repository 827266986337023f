"""Log-probabilities of the source, kept on disk in 16 bits, so that one model at a time is in memory.

A token's log-probabilities are stored as ``top - code * step``: ``top`` and ``step`` in FP32, codes in uint16, over
the range of the token (at most 32 nats below its top; what lies lower, 1e-14 of the probability, is raised to that)
and normalised again when read. That is llama.cpp's layout for the same purpose, with twice its range; its error is
compared with that of FP16, BF16 and FP32 in docs/evaluation.md. A checksum of the FP32 bits goes with each token:
log-probabilities with the same bits have a divergence of exactly zero, which rounding would hide.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfbyte.checkpoint import write_file_atomic
from halfbyte.checkpoint.files import reason
from halfbyte.checkpoint.scratch import scratch_folder, sweep
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.divergence import TokenScores, divergence

VERSION = 2  # 1 kept references of models whose logits are not finite
RANGE = 32.0
LEVELS = 65535
_SCRATCH = "reference"
_META, _CODES, _TOKENS = "meta.json", "codes.u16", "tokens.npz"


def compress(log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (int32 below 65536) [tokens, vocabulary], top and step (FP32) [tokens] of FP32 log-probabilities."""
    top = log_probs.amax(dim=1)
    low = torch.maximum(log_probs.amin(dim=1), top - RANGE)
    step = (top - low).clamp_min(1e-30) / LEVELS
    codes = ((top[:, None] - log_probs) / step[:, None]).clamp_max(LEVELS).round().int()
    return codes, top, step


def expand(codes: torch.Tensor, top: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """FP32 log-probabilities of ``compress``'s result, normalised."""
    return torch.log_softmax(top[:, None] - codes.float() * step[:, None], dim=1)


def checksum(log_probs: torch.Tensor) -> torch.Tensor:
    """64 bits per token (int64) that change with any bit of its FP32 log-probabilities, or with their order."""
    bits = log_probs.contiguous().view(torch.int32).long()
    place = torch.arange(bits.shape[1], device=bits.device) * 2 + 1
    return (bits * (place * 0x9E3779B97F4A7C1 + 1)).sum(dim=1)


class Writer:
    """Collects a reference, token after token, in a folder that ``commit`` gives its final name."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.folder, self.vocabulary = folder, vocabulary
        self._codes: IO[bytes] = (folder / _CODES).open("wb")
        self._tokens: dict[str, list[NDArray[Any]]] = {k: [] for k in ("top", "step", "checksum", "top_token")}

    def add(self, log_probs: torch.Tensor) -> None:
        """Append the log-probabilities of some tokens, FP32 [tokens, vocabulary]."""
        codes, top, step = compress(log_probs)
        self._codes.write(codes.cpu().numpy().astype("<u2").tobytes())
        per_token = {"top": top, "step": step, "checksum": checksum(log_probs), "top_token": log_probs.argmax(dim=1)}
        for name, values in per_token.items():
            self._tokens[name].append(values.cpu().numpy())

    def close(self, key: Mapping[str, Any], **more: NDArray[Any]) -> None:
        """Write what goes with the codes, and make all of it durable."""
        _sync(self._codes)
        self._codes.close()
        arrays = {name: np.concatenate(values) for name, values in self._tokens.items()}
        with (self.folder / _TOKENS).open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays, **more)
            _sync(file)
        meta = {"version": VERSION, "key": dict(key), "vocabulary": self.vocabulary, "tokens": len(arrays["top"])}
        with (self.folder / _META).open("w", encoding="utf-8") as text:
            json.dump(meta, text, indent=1)
            _sync(text)

    def abort(self) -> None:
        """Close the file of an unfinished reference."""
        self._codes.close()


class Reference:
    """A stored reference. ``nll`` and ``window`` are the source's own scores, per token."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        self.key: dict[str, Any] = meta["key"]
        self.vocabulary: int = meta["vocabulary"]
        shape = (meta["tokens"], self.vocabulary)
        self._codes = np.memmap(folder / _CODES, dtype="<u2", mode="r", shape=shape)
        if (folder / _CODES).stat().st_size != self._codes.nbytes:
            raise ValueError("the codes have another size")
        with np.load(folder / _TOKENS, allow_pickle=False) as arrays:
            self._arrays = {name: arrays[name] for name in arrays.files}
        if {len(values) for values in self._arrays.values()} != {meta["tokens"]}:
            raise ValueError("an array has another length")
        if not all(np.isfinite(self._arrays[name]).all() for name in ("nll", "top", "step")):
            raise ValueError("a number is not finite")

    @property
    def nll(self) -> NDArray[np.float64]:
        """Negative log-likelihoods of the source."""
        return self._arrays["nll"]

    @property
    def window(self) -> NDArray[np.int64]:
        """The window that each token is in."""
        return self._arrays["window"]

    def compare(self, first: int, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(reference || other) in nats and whether the top tokens are equal, of tokens first.. ."""
        stop, device = first + len(log_probs), log_probs.device
        top, step, kept, best = (
            torch.from_numpy(self._arrays[name][first:stop]).to(device)
            for name in ("top", "step", "checksum", "top_token")
        )
        codes = torch.from_numpy(self._codes[first:stop].astype(np.int32)).to(device)
        kl = divergence(expand(codes, top, step), log_probs)
        return torch.where(kept == checksum(log_probs), 0.0, kl), best == log_probs.argmax(dim=1)


class Cache:
    """References and scores by key, in a folder; entries appear complete or not at all."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / "references"

    def path(self, key: Mapping[str, Any]) -> Path:
        """Return the path of the entry with this key."""
        text = json.dumps({**key, "version": VERSION}, sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:40]

    def find(self, key: Mapping[str, Any]) -> Reference | None:
        """The stored reference, or None where there is none or it is damaged."""
        try:
            reference = Reference(self.path(key))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None
        return reference if reference.key == json.loads(json.dumps(dict(key))) else None

    @contextmanager
    def write(self, key: Mapping[str, Any], vocabulary: int, tokens: int) -> Iterator[Writer]:
        """A writer whose reference is there, under its key, only if the block ends without an exception."""
        needed = tokens * (2 * vocabulary + 48)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(_SCRATCH, self.folder)  # which may free the room that is missing
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise HalfbyteError(
                    f"the reference log-probabilities take {needed:,} bytes, but {self.folder} has {free:,} free; "
                    "choose another place (--cache DIR), fewer tokens (--max-tokens) or conversations"
                )
            with scratch_folder(_SCRATCH, self.folder) as partial:
                writer = Writer(partial, vocabulary)
                try:
                    yield writer
                    self._keep(key, partial)
                finally:
                    writer.abort()
        except OSError as error:
            raise HalfbyteError(f"the cache {self.folder} cannot be written ({reason(error)})") from error

    def _keep(self, key: Mapping[str, Any], partial: Path) -> None:
        """Give a complete reference its name."""
        final = self.path(key)
        shutil.rmtree(final, ignore_errors=True)  # damaged, or find would have given it
        try:
            os.replace(partial, final)
        except OSError:
            if self.find(key) is None:  # else another process was quicker
                raise

    def find_scores(self, key: Mapping[str, Any]) -> TokenScores | None:
        """Scores that were stored under this key."""
        try:
            with np.load(f"{self.path(key)}.npz", allow_pickle=False) as arrays:
                kl, top = (arrays[name] if name in arrays.files else None for name in ("kl", "same_top"))
                scores = TokenScores(arrays["nll"], arrays["window"], kl, top)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        return scores if scores.is_finite else None

    def store_scores(self, key: Mapping[str, Any], scores: TokenScores) -> None:
        """Keep scores; the file appears complete or not at all."""
        content = io.BytesIO()
        np.savez(
            content, allow_pickle=False, **{name: values for name, values in vars(scores).items() if values is not None}
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file_atomic(Path(f"{self.path(key)}.npz"), content.getvalue())
        except OSError as error:
            raise HalfbyteError(f"the cache {self.folder} cannot be written ({reason(error)})") from error


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
