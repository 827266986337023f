"""``halfbyte train``: a model, a quantized start and a text become a trained checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import Inventory
from halfbyte.checkpoint.journal import check_output
from halfbyte.convert.conversion import Conversion
from halfbyte.errors import HalfbyteError, MeasurementError
from halfbyte.runtime.loading import load, load_tokenizer
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.train.answers import measure_answers
from halfbyte.train.cached_teacher import CachedTeacher
from halfbyte.train.export_student import export
from halfbyte.train.local_training import LocalOptions, LocalOutcome, train_layers
from halfbyte.train.masters import Start
from halfbyte.train.objectives import Distillation, NextToken, Objective, SecondModel
from halfbyte.train.student import Kept, prepare, student_of
from halfbyte.train.token_batches import make_batches
from halfbyte.train.training_loop import TrainingOptions, TrainingOutcome, fit, rate_of
from halfbyte.train.training_state import TrainingState

Progress = Callable[[int, int], None]
# a model, its masters, gradients and both moments of AdamW, in FP32, and the teacher
_BYTES_PER_WEIGHT = {"distill": 24, "task": 20}


@dataclass(frozen=True)
class TextOptions:
    """The text: files to train on, files ``held_out`` for choosing the best step, and how they are cut."""

    texts: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    length: int = 512
    batch_size: int = 1
    seed: int = 0


@dataclass(frozen=True)
class StudentOptions:
    """How the student is prepared and what teaches it; ``teacher``: a checkpoint (default: the model itself), or the
    folder of a ``CachedTeacher``."""

    master: Start = "cell"
    activations: str | None = None
    kept: Kept = "frozen"
    top_k: int | None = None
    teacher: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    dialect: str | None = None
    answers: int = 8


@dataclass
class Training:
    """What a run did: the loop's outcome, the conversion, and the lengths of answers by model."""

    method: str
    outcome: TrainingOutcome
    conversion: Conversion
    answers: dict[str, Any] = field(default_factory=dict)


def work_folder(out: str | Path) -> Path:
    """The folder beside an output that holds its unfinished training."""
    path = Path(out).expanduser()
    return path.with_name(f"{path.name}.training")


def train_end_to_end(
    model: str,
    out: str | Path,
    start: str,
    method: str,
    text: TextOptions,
    training: TrainingOptions,
    student: StudentOptions,
    resume: bool = False,
    progress: Progress | None = None,
) -> Training:
    """Train the whole model from a quantized ``start``, by distillation or with the loss of the text itself.

    The output appears when training is finished; an unfinished one lies in ``work_folder(out)``. HalfbyteError for
    what does not fit together, before anything is written.
    """
    check_output(out, start)
    _tidy(Path(out).expanduser())
    origin = Inventory.open(model)
    _check_memory(Checkpoint(origin), method)
    network = load(model, student.dtype, dequantize=True, device=student.device)
    vocabulary = network.get_input_embeddings().weight.shape[0]
    batches = make_batches(
        text.texts, load_tokenizer(model), text.length, text.batch_size, text.seed, text.held_out, vocabulary
    )
    prepare(network, start, master=student.master, activations=student.activations, kept=student.kept)
    objective = _objective(model, method, student)
    rate = training.rate or rate_of(student_of(network), student.master)
    about: list[Any] = [method, asdict(training), asdict(student), batches.fingerprint, origin.fingerprint]
    about += [student_of(network).origin.checkpoint.inventory.fingerprint, rate]
    state = TrainingState(work_folder(out), hashlib.sha256(json.dumps(about).encode()).hexdigest(), resume)
    answers = {}
    if student.answers:
        prompts = batches.held_out[: student.answers, : max(1, text.length // 4)]
        answers["start"] = measure_answers(network, prompts).to_dict()
    try:
        outcome = fit(network, objective, batches, training, rate, state, progress)
        if outcome.best == 0 and outcome.stopped:
            raise MeasurementError(f"{outcome.stopped}, which is the start itself; train with a lower rate")
    except MeasurementError:
        state.finish()  # there is nothing to continue
        raise
    if student.answers:
        answers["trained"] = measure_answers(network, prompts).to_dict()
    record = describe(method, outcome, text, training, teacher=student.teacher or model, top_k=student.top_k)
    conversion = export(network, out, student.dialect, record)
    state.finish()
    return Training(method, outcome, conversion, answers)


def train_locally(
    model: str,
    out: str | Path,
    start: str,
    text: TextOptions,
    options: LocalOptions,
    dialect: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> LocalOutcome:
    """Train one decoder layer after the other (``halfbyte.train.local_training``) on these texts."""
    config = Inventory.open(model).config
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    batches = make_batches(
        text.texts, load_tokenizer(model), text.length, text.batch_size, text.seed, text.held_out, size
    )
    return train_layers(model, start, out, batches, options, dialect, resume, progress)


def describe(
    method: str,
    outcome: TrainingOutcome,
    text: TextOptions,
    training: TrainingOptions,
    teacher: str | None,
    **more: Any,
) -> dict[str, Any]:
    """What halfbyte.json says of a training; no paths."""
    return {
        "method": method,
        "steps": outcome.steps,
        "best_step": outcome.best,
        "tokens": outcome.tokens,
        "rate": outcome.rate,
        "teacher": None if method == "task" or teacher is None else Path(teacher.rstrip("/")).name,
        "length": text.length,
        "batch_size": text.batch_size,
        "seed": text.seed,
        **{name: value for name, value in more.items() if value is not None},
        **({"stopped": outcome.stopped} if outcome.stopped else {}),
    }


def _objective(model: str, method: str, student: StudentOptions) -> Objective:
    if method == "task":
        return NextToken()
    if student.teacher is not None and CachedTeacher.is_folder(student.teacher):
        return Distillation(CachedTeacher(student.teacher))
    teacher = load(student.teacher or model, student.dtype, dequantize=True, device=student.device)
    return Distillation(SecondModel(teacher), student.top_k)


def _check_memory(checkpoint: Checkpoint, method: str) -> None:
    """Refuse a model whose training cannot fit in this machine's memory."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    elements = sum(math.prod(weight.shape) for weight in checkpoint.weights)
    needed, there = elements * _BYTES_PER_WEIGHT[method], os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise HalfbyteError(
            f"training {checkpoint.inventory.source} end to end needs about {needed / 1e9:.0f} GB of memory, and there "
            f"are {there / 1e9:.0f}; use --method local, which holds one layer at a time"
        )


def _tidy(out: Path) -> None:
    """Leave no empty folder behind where training fails."""
    with suppress(OSError):
        out.rmdir()


__all__ = ["StudentOptions", "TextOptions", "Training", "train_end_to_end", "train_locally", "work_folder"]
