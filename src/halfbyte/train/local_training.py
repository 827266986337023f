"""Training layer by layer: one decoder layer is in memory, and learns to give the teacher's hidden states.

The teacher's states come from the source's own layers, the student's from the trained ones before it, so that each
layer also mends what earlier ones left (as block-wise distillation in llm-compressor does, without its re-observed
scales). Finished layers lie in a folder beside the output, so that a killed run continues there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from halfbyte.calibrate.layerwise import Arguments, LayerwiseModel, as_numpy, enter, run_layer
from halfbyte.calibrate.states import States, release_memory
from halfbyte.checkpoint import Reader
from halfbyte.checkpoint.journal import check_output
from halfbyte.convert.conversion import Conversion
from halfbyte.errors import HalfbyteError, MeasurementError
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.train.export_student import write
from halfbyte.train.layer_files import LayerFiles
from halfbyte.train.layer_fit import fit_layer
from halfbyte.train.masters import Start, master_of
from halfbyte.train.parameter_map import Place
from halfbyte.train.start import Origin, origin_of
from halfbyte.train.straight_through import TrainedWeight, as_array
from halfbyte.train.student import install
from halfbyte.train.token_batches import TokenBatches
from halfbyte.train.training_loop import TrainingOptions, rate_of_weights

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LocalOptions:
    """``steps`` of each layer, over the first ``samples`` sequences; the rest as in ``TrainingOptions``."""

    steps: int = 100
    samples: int = 64
    rate: float | None = None
    master: Start = "cell"
    check_every: int = 25


@dataclass
class LocalOutcome:
    """Mean squared error of each layer's output on the held-out sequences: at the start, and as it is written."""

    tokens: int
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    conversion: Conversion | None = None


def train_layers(
    source: str | Path,
    start: str | Path,
    out: str | Path,
    batches: TokenBatches,
    options: LocalOptions | None = None,
    dialect: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    device: str = "cpu",
) -> LocalOutcome:
    """Train every decoder layer of a quantized ``start`` towards ``source``, and write the result to ``out``.

    A layer is never worse on the held-out sequences than it was. HalfbyteError where source and start do not belong
    together or a layer's states are not finite, OutputError for folders that cannot be used.
    """
    options = options or LocalOptions()
    origin, original = origin_of(start), Checkpoint.open(source)
    if origin.plan is None and origin.smoothed and options.master != "decoded":
        raise HalfbyteError(
            f"the weights of {origin.name} were smoothed (AWQ), so they are not those of the source; start from "
            "decoded values (master decoded)"
        )
    out = Path(out).expanduser()
    check_output(out, start)
    with contextlib.suppress(OSError):
        out.rmdir()  # it appears when it is complete
    about = [
        asdict(options),
        batches.fingerprint,
        original.inventory.fingerprint,
        origin.checkpoint.inventory.fingerprint,
    ]
    fingerprint = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    files = LayerFiles(out.with_name(f"{out.name}.training"), fingerprint, resume)
    with _cleared(files), Reader(original.inventory) as left, Reader(origin.checkpoint.inventory) as right:
        where = torch.device(device)
        models = [LayerwiseModel(c, r, torch.float32, where) for c, r in ((original, left), (origin.checkpoint, right))]
        if len(models[0].layers) != len(models[1].layers):
            raise HalfbyteError(
                f"{origin.name} has {len(models[1].layers)} layers and the source {len(models[0].layers)}; give the "
                "model that was quantized"
            )
        outcome = _Run(
            models[0], models[1], right, origin, batches, options, files, progress or (lambda a, b: None)
        ).go()
    record = {
        "method": "local",
        "steps": options.steps,
        "tokens": outcome.tokens,
        "teacher": original.inventory.source.rstrip("/").rsplit("/", 1)[-1],
        "length": batches.sequences.shape[1],
        "batch_size": batches.batch_size,
        "seed": batches.seed,
    }
    outcome.conversion = write(origin, files.tensors(), {}, out, dialect, record)
    files.finish()
    return outcome


@contextlib.contextmanager
def _cleared(files: LayerFiles) -> Iterator[None]:
    """Leave no folder behind where a training is refused before a layer is finished."""
    try:
        yield
    except HalfbyteError:
        if not files.done:
            files.finish()
        raise


class _Run:
    def __init__(
        self,
        teacher: LayerwiseModel,
        student: LayerwiseModel,
        reader: Reader,
        origin: Origin,
        batches: TokenBatches,
        options: LocalOptions,
        files: LayerFiles,
        progress: Progress,
    ) -> None:
        self.teacher, self.student, self.reader = teacher, student, reader
        self.origin, self.options = origin, options
        self.files, self.progress, self.seed = files, progress, batches.seed
        size = batches.batch_size
        train = batches.sequences[: min(options.samples, len(batches.sequences)) // size * size]
        held = batches.held_out[: max(size, len(batches.held_out) // size * size)]
        if not len(train) or len(held) % size:
            raise HalfbyteError(
                f"the text has fewer sequences than a batch of {size}; give more text or smaller batches"
            )
        self.size, self.trained = size, len(train)
        self.ids = torch.cat([train, held]).to(student.device)
        self.length = self.ids.shape[1]
        width = student.decoder.config.hidden_size
        self.states = {
            (who, number): States(files.folder / f"{who}-{number}.f32", width)
            for who in ("teacher", "student")
            for number in (0, 1)
        }

    def go(self) -> LocalOutcome:
        """All layers from the first that is not finished."""
        calls = [self._enter(model, who) for model, who in ((self.teacher, "teacher"), (self.student, "student"))]
        count = len(self.student.layers)
        for number in range(self.files.done, count):
            self.progress(number, count)
            errors = self._layer(number, calls[0][number], calls[1][number])
            for state in self.states.values():
                state.sync()
            self.files.finish_layer(number, errors)
            release_memory()
        self.progress(count, count)
        pairs = self.files.errors
        return LocalOutcome(self.trained * self.length, [a for a, _ in pairs], [b for _, b in pairs])

    @torch.no_grad()
    def _enter(self, model: LayerwiseModel, who: str) -> list[Arguments]:
        """Embed all sequences, unless an earlier run has; what layers are called with is alike for all batches."""
        calls: list[Arguments] = []
        with model.embedding(self.ids):
            for first in range(0, len(self.ids), self.size):
                if calls and self.files.done:
                    break
                hidden, calls = enter(model, self.ids[first : first + self.size])
                if not self.files.done:
                    self._write(who, 0, first, hidden)
        return calls

    def _layer(self, number: int, call: Arguments, own: Arguments) -> tuple[float, float]:
        """Train one layer and pass all sequences on; its held-out error before and after."""
        teacher, student = self.teacher.layers[number], self.student.layers[number]
        with self.teacher.filled(teacher), self.student.filled(student):
            _widen(teacher)
            with torch.no_grad():
                for first in range(0, len(self.ids), self.size):
                    self._write(
                        "teacher", number + 1, first, run_layer(teacher, self._read("teacher", number, first), call)
                    )
            with self._trained(teacher, student) as weights:
                errors = self._fit(number, student, own, weights) if weights else (0.0, 0.0)
                with torch.no_grad():
                    for weight in weights.values():
                        weight.fixed = [weight(weight.master)]
                    for first in range(0, len(self.ids), self.size):
                        self._write(
                            "student", number + 1, first, run_layer(student, self._read("student", number, first), own)
                        )
                self.files.write(number, {name: weight.final() for name, weight in weights.items()})
        return errors

    def _fit(
        self, number: int, layer: nn.Module, call: Arguments, weights: Mapping[str, TrainedWeight]
    ) -> tuple[float, float]:
        def error(first: int) -> torch.Tensor:
            out = run_layer(layer, self._read("student", number, first), call)
            return nn.functional.mse_loss(out, self._read("teacher", number + 1, first))

        options = self.options
        rate = options.rate or rate_of_weights(weights.values(), options.master)
        batches = range(0, self.trained, self.size), range(self.trained, len(self.ids), self.size)
        plan = TrainingOptions(options.steps, check_every=options.check_every)
        return fit_layer(weights, error, batches, rate, plan, np.random.default_rng([self.seed, number]))

    @contextlib.contextmanager
    def _trained(self, teacher: nn.Module, student: nn.Module) -> Iterator[dict[str, TrainedWeight]]:
        """The quantized weights of a layer with masters, for as long as the context lasts."""
        originals = dict(zip(self.student.parameters_of(student), teacher.parameters(), strict=True))
        weights: dict[str, TrainedWeight] = {}
        try:
            for target in list(originals):
                place = self._place(target)
                if place is not None:
                    weights[place.weight.name] = self._install(place, originals[target])
            yield weights
        finally:
            for weight in weights.values():
                weight.forget()
            for module in list(student.modules()):
                for name in list(getattr(module, "parametrizations", {})):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=False)

    def _place(self, target: str) -> Place | None:
        """The quantized weight that a parameter holds whole, if it holds one."""
        uses = self.student.uses.get(target, [])
        items = [self.origin.items[name] for name, _ in uses if name in self.origin.items]
        if not items:
            return None
        weight, shape = items[0].weight, tuple(self.student.model.get_parameter(target).shape)
        swapped = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
        swaps = self.origin.checkpoint.family.transposed and len(shape) == 3
        if len(uses) > 1 or shape != (swapped if swaps else weight.shape):
            raise HalfbyteError(
                f"{target} of the model holds {weight.name} in another form, so it cannot be trained; use a start that "
                "keeps this weight"
            )
        return Place(weight, target, swaps)

    def _install(self, place: Place, original: torch.Tensor) -> TrainedWeight:
        tensor = self.origin.checkpoint.read_quantized(self.reader, place.weight)
        values = as_array(original.transpose(-1, -2) if place.transposed else original)
        master = master_of(place.weight.name, tensor, values, self.options.master)
        weight = install(self.student.model, place, tensor, master, None)
        weight.master.requires_grad_(True)
        return weight

    def _read(self, who: str, number: int, first: int) -> torch.Tensor:
        """Hidden states [batch, length, width] of the sequences from ``first`` before a layer."""
        states = self.states[who, number % 2].read(slice(first * self.length, (first + self.size) * self.length))
        return torch.from_numpy(states).to(self.student.device).view(self.size, self.length, -1)

    def _write(self, who: str, number: int, first: int, hidden: torch.Tensor) -> None:
        if not torch.isfinite(hidden).all():
            raise MeasurementError(f"the {who}'s states before layer {number} are not finite; check the checkpoints")
        rows = slice(first * self.length, (first + self.size) * self.length)
        self.states[who, number % 2].write(rows, as_numpy(hidden))


def _widen(layer: nn.Module) -> None:
    """Stacks of experts that lie as narrow as in the checkpoint are computed in FP32."""
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dtype != torch.float32:
                module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)
