"""Training models back after quantization: students, distillation, and exports bit for bit."""

from halfbyte.train.export_student import export
from halfbyte.train.student import prepare
from halfbyte.train.trainer_callback import Distill

__all__ = ["Distill", "export", "prepare"]
