"""What activations say about weights: importance of input columns, from halfbyte's and llama.cpp's files."""

from halfbyte.calibration.calibration import Activations, Calibration, calibration_for, calibration_of
from halfbyte.calibration.importance import Importance, Matched, match_importance
from halfbyte.calibration.importance_file import read_importance, write_importance

__all__ = [
    "Activations",
    "Calibration",
    "Importance",
    "Matched",
    "calibration_for",
    "calibration_of",
    "match_importance",
    "read_importance",
    "write_importance",
]
