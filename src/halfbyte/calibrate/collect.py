"""Calibration: text goes through the model layer by layer, and what its matrices see is summed up.

One decoder layer is in memory at a time; hidden states between layers lie in files. Each finished layer is
noted, so that an interrupted run continues there.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from halfbyte.calibrate.caches import arrays_of, watch_caches
from halfbyte.calibrate.experts import show_all_tokens
from halfbyte.calibrate.hidden_states import Calls, check_output, embed, output_matrix, read_batch
from halfbyte.calibrate.layerwise import LayerwiseModel, as_numpy, run_layer
from halfbyte.calibrate.observe import Observer, Sums
from halfbyte.calibrate.reverse_pass import ReversePass
from halfbyte.calibrate.samples import Samples, make_samples
from halfbyte.calibrate.states import States, release_memory
from halfbyte.calibration.model_identity import identity_of
from halfbyte.calibration.statistics import (
    Part,
    Statistics,
    new_description,
    read_description,
    write_description,
    write_part,
)
from halfbyte.checkpoint import Reader
from halfbyte.errors import MeasurementError, OutputError
from halfbyte.runtime.loading import load_tokenizer
from halfbyte.source.checkpoint import Checkpoint

HESSIAN_BYTES = 2 << 30
_WORK = "work"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CollectOptions:
    """How statistics are collected.

    ``samples`` pieces of ``length`` tokens are taken evenly from all texts. With ``hessians``, sums of xᵀx are
    collected beside those of x²; a stack of experts whose own would need more than ``hessian_bytes`` gets one for
    all. ``all_experts`` shows every token to every expert, whoever the router chooses: slower, but no expert is left
    without data. ``output_hessians``: a second pass, from the head back to the first layer, sums up gradients at the
    outputs; the states of all layers stay on the disk until then. ``bos``: whether every piece begins with the token
    that begins a text (auto, yes, no). Layers are computed in ``dtype`` (its name, or torch's) on ``device``.
    """

    samples: int = 128
    length: int = 512
    hessians: bool = True
    all_experts: bool = False
    hessian_bytes: int = HESSIAN_BYTES
    bos: str = "auto"
    output_hessians: bool = False
    dtype: torch.dtype | str = "float32"
    device: torch.device | str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        kind: torch.dtype = getattr(torch, self.dtype) if isinstance(self.dtype, str) else self.dtype
        return kind


def collect_statistics(
    source: str | Path,
    out: str | Path,
    texts: Sequence[str | Path],
    options: CollectOptions | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Statistics:
    """Collect statistics of a checkpoint's activations over ``texts`` in the folder ``out``, or continue there.

    ``progress`` is called with the number of layers done and their total, ``announce`` with a line at the beginning
    where an earlier run is continued. OutputError where ``out`` holds something else; HalfbyteError for a text that is
    too short.
    """
    options = options or CollectOptions()
    out = Path(out)
    checkpoint = Checkpoint.open(source)
    samples = make_samples(texts, load_tokenizer(source), options.samples, options.length, options.bos)
    mode = torch.no_grad() if options.output_hessians else torch.inference_mode()
    with Reader(checkpoint.inventory) as reader, mode:
        model = LayerwiseModel(checkpoint, reader, options.torch_dtype, torch.device(options.device))
        description = describe_run(checkpoint, samples, len(model.layers), options)
        begin(out, description, announce)
        if description.get("complete"):
            shutil.rmtree(out / _WORK, ignore_errors=True)  # of a run that was killed after its last layer
        else:
            _Run(
                model,
                samples,
                out,
                description,
                progress or (lambda done, total: None),
                announce or (lambda line: None),
            ).go()
    return Statistics(out)


def describe_run(checkpoint: Checkpoint, samples: Samples, layers: int, options: CollectOptions) -> dict[str, Any]:
    """Describe a calibration that has not begun."""
    source = checkpoint.inventory.source.rstrip("/").rsplit("/", 1)[-1]
    back = [f"outputs-{i:05d}" for i in reversed(range(layers))]
    return new_description(
        source={
            "name": source,
            "fingerprint": checkpoint.inventory.fingerprint,
            "identity": identity_of(checkpoint),
        },
        texts=list(samples.texts),
        tokens_sha256=samples.fingerprint,
        samples=len(samples.tokens),
        tokens=samples.total,
        length=options.length,
        dtype=str(options.torch_dtype).removeprefix("torch."),
        hessians=options.hessian_bytes if options.hessians else 0,
        all_experts=options.all_experts,
        bos=samples.bos,
        caches=True,
        **({"output_hessians": True} if options.output_hessians else {}),
        parts=[*(f"layer-{i:05d}" for i in range(layers)), "head", *(back if options.output_hessians else [])],
        done=0,
    )


def begin(out: Path, description: dict[str, Any], announce: Callable[[str], None] | None) -> None:
    """Make the folder of a calibration, or note in ``description`` how much of it is there; OutputError for another's.

    ``announce`` is called with a line where it is continued.
    """
    description["done"] = _resume(out, description)
    if description["done"] and announce:
        finished = "complete already" if description.get("complete") else "continued"
        total = len(description["parts"])
        announce(f"{out} is {finished}: {description['done']} of {total} layers were calibrated before")


def _resume(out: Path, description: dict[str, Any]) -> int:
    """How many parts ``out`` holds already of just this calibration."""
    if not out.exists() or not any(out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        write_description(out, description)
        return 0
    before = read_description(out) if (out / "statistics.json").is_file() else {}
    if {**before, "done": 0, "complete": False} != description:
        raise OutputError(f"{out} is not empty and holds something other than this calibration; choose another folder")
    description["complete"] = before["complete"]
    return int(before["done"])


class _Run:
    def __init__(
        self,
        blocks: LayerwiseModel,
        samples: Samples,
        out: Path,
        description: dict[str, Any],
        progress: Progress,
        announce: Callable[[str], None],
    ) -> None:
        self.blocks, self.samples, self.out, self.description = blocks, samples, out, description
        self.progress, self.announce = progress, announce
        width = blocks.decoder.config.hidden_size
        self.work = out / _WORK
        self.work.mkdir(exist_ok=True)
        # one file is read while the other is written, so that a killed run finds the states it needs; the way back
        # needs those before every layer
        self.back = bool(description.get("output_hessians"))
        files = len(blocks.layers) + 1 if self.back else 2
        self.states = [States(self.work / f"states-{number}.f32", width) for number in range(files)]

    @property
    def _name(self) -> str:
        name: str = self.description["source"]["name"]
        return name

    def go(self) -> None:
        total = len(self.description["parts"])
        calls = embed(self.blocks, self.samples, [] if self.description["done"] else self.states[:1], self._name)
        self.states[0].sync()
        for number, layer in enumerate(self.blocks.layers):
            if number < self.description["done"]:
                continue
            self.progress(number, total)
            self._finish(number, self._layer(layer, calls, number))
            # else the C library keeps what a layer no longer needs, in pieces that the next cannot use
            release_memory()
        layers = len(self.blocks.layers)
        if self.description["done"] <= layers:
            self.progress(layers, total)
            self._finish(layers, self._head())
        if self.back:
            self._go_back(calls)
        self.description["complete"] = True
        write_description(self.out, self.description)
        shutil.rmtree(self.work)
        self.progress(total, total)

    def _go_back(self, calls: Calls) -> None:
        """Gradients, from the head to the first layer."""
        layers, total = len(self.blocks.layers), len(self.description["parts"])
        limit = self.description["hessians"] or HESSIAN_BYTES
        back = ReversePass(self.blocks, self.states, self.work, self.samples.batches, limit, self.announce)
        if self.description["done"] == layers + 1:
            back.begin()
        for number in reversed(range(layers)):
            place = total - 1 - number
            if place < self.description["done"]:
                continue
            self.progress(place, total)
            self._finish(place, back.layer(number, calls))
            release_memory()

    def _finish(self, number: int, part: Part) -> None:
        write_part(self.out, self.description["parts"][number], part)
        self._state(number + 1).sync()
        self.description["done"] = number + 1
        write_description(self.out, self.description)

    def _state(self, number: int) -> States:
        """The file of the states before a layer, or after the last one."""
        return self.states[number % len(self.states)]

    def _layer(self, layer: nn.Module, calls: Calls, number: int) -> Part:
        before, after = self._state(number), self._state(number + 1)
        with self.blocks.filled(layer):
            observer = Observer(self.blocks.parameters_of(layer), self._mode, self.blocks.dtype)
            every = show_all_tokens(layer, observer) if self.description["all_experts"] else contextlib.nullcontext()
            with observer, watch_caches(self.blocks.attentions_of(layer)) as caches, every:
                for rows, shape in self.samples.batches():
                    hidden, call = read_batch(self.blocks, before, rows, shape), calls[shape][number]
                    result = run_layer(layer, hidden, call)
                    check_output(self.blocks, self._name, layer, hidden, call, result)
                    after.write(rows, as_numpy(result))
                    observer.forget_inputs()
        part = self._by_weight(observer)
        part.arrays |= arrays_of(caches)
        return part

    def _head(self) -> Part:
        """What the output matrix sees: the last states after the final norm."""
        states = self._state(len(self.blocks.layers))
        output = output_matrix(self.blocks)
        if output is None:
            return Part()
        name, head, norm = output
        if name not in self.blocks.uses:
            return Part()  # tied: the checkpoint has the embedding alone, whose rows are looked up
        sums = Sums.zeros((), states.width, self._mode(name, head.weight), self.blocks.device)
        with self.blocks.filled(norm):
            for rows, shape in self.samples.batches():
                sums.add(norm(read_batch(self.blocks, states, rows, shape)).reshape(-1, states.width), None)
        observed = Observer({}, self._mode)
        observed.sums[name] = sums
        return self._by_weight(observed)

    def _mode(self, name: str, parameter: nn.Parameter) -> str:
        """Whether products are collected: for each expert (``own``), for all together (``pooled``), or not."""
        limit = self.description["hessians"]
        columns = self.blocks.columns(name)
        if not limit:
            return ""
        experts = parameter.shape[0] if parameter.dim() == 3 else 1
        return "own" if experts * columns * columns * 4 <= limit else "pooled" if experts > 1 else ""

    def _by_weight(self, observer: Observer) -> Part:
        """From the model's parameters to the checkpoint's weights; MeasurementError for sums that are not finite."""
        part = Part()
        for target, sums in observer.sums.items():
            if not sums.is_finite:
                raise MeasurementError(
                    f"the inputs of {target} in {self._name}, or their squares, are not finite, so they "
                    "say nothing; compute with --dtype float32, or repair the checkpoint"
                )
        keepers: dict[str, str] = {}
        for target, sums in observer.sums.items():
            for weight, expert in self.blocks.uses.get(target, ()):
                if expert is None:
                    if target in keepers:
                        part.same[weight] = keepers[target]
                    else:
                        keepers[target] = weight
                        part.arrays[weight] = sums.arrays()
                        if target in observer.routed:
                            part.arrays[weight]["routed"] = observer.routed[target].cpu().numpy()
                else:
                    _put(part, weight, expert, sums, self.blocks.experts_of(weight))
        for target, other in observer.same.items():
            for weight, _ in self.blocks.uses.get(target, ()):
                if other in keepers:
                    part.same[weight] = keepers[other]
        return part


def _put(part: Part, weight: str, expert: int, sums: Sums, experts: int) -> None:
    """One expert that is a module of its own goes into the arrays of its stack."""
    for kind, array in sums.arrays().items():
        stack = part.arrays.setdefault(weight, {}).setdefault(kind, np.zeros((experts, *array.shape), array.dtype))
        stack[expert] = array
