"""Errors that a user can act on: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Mapping


class HalfbyteError(Exception):
    """Base of every error that halfbyte raises on purpose; the command line prints it without a traceback."""

    exit_code = 2


class CheckpointError(HalfbyteError):
    """A source checkpoint cannot be read or is not what its headers say."""


class UnconvertibleError(CheckpointError):
    """What a source holds cannot be converted, and a rerun would meet it again: no part of the output is kept.

    ``weights``: of those that another format could hold, or that can stay unquantized, the names and what is wrong.
    """

    def __init__(self, message: str, weights: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.weights = dict(weights or {})


class FormatError(HalfbyteError):
    """A format or search is unknown, or cannot hold the given array."""


class RecipeError(HalfbyteError):
    """A recipe is invalid or does not fit the checkpoint."""


class PlanError(HalfbyteError):
    """The combination of checkpoint, recipe and dialect is refused before any work."""


class OutputError(HalfbyteError):
    """The output cannot be written: folder in use, disk full, output inside the input."""


class OutputBusyError(OutputError):
    """Another process holds the output folder at this moment."""


class MeasurementError(HalfbyteError):
    """A model gives numbers that are no measurement: values that are not finite."""


class VerifyError(HalfbyteError):
    """The output does not match its plan or source."""

    exit_code = 1
