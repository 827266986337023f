"""Calibration and quantization in one pass: every layer is rounded for what the layers before it have become.

Two streams of hidden states go through the model layer by layer, that of the source and that of the quantized model.
A layer is quantized step by step (``halfbyte.calibrate.layer_steps``); each step sees what the steps before it made of
its inputs. One layer is in memory at a time, as it was and as it becomes; hidden states of both streams lie in files.
Each finished layer is noted, so that an interrupted run continues there. The folder holds the rounded weights, which
``halfbyte.convert`` only has to spell in the dialect.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from halfbyte.calibrate.caches import arrays_of, watch_caches
from halfbyte.calibrate.collect import (
    CollectOptions,
    Progress,
    begin,
    collect_statistics,
    describe_run,
)
from halfbyte.calibrate.hidden_states import Calls, check_output, embed, output_matrix, read_batch
from halfbyte.calibrate.layer_steps import Group, Step, find_steps
from halfbyte.calibrate.layerwise import LayerwiseModel, as_numpy
from halfbyte.calibrate.samples import Samples, make_samples
from halfbyte.calibrate.states import States, release_memory
from halfbyte.calibrate.step_rounder import Rounded, StepRounder
from halfbyte.calibrate.taps import Taps
from halfbyte.calibrate.two_streams import Batch, Shelf, run_quantized, run_source
from halfbyte.calibration.rounded import to_arrays
from halfbyte.calibration.statistics import Part, Statistics, write_description, write_part
from halfbyte.checkpoint import Reader
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.shards import Item
from halfbyte.plan.target import methods_of, rounded_by
from halfbyte.recipes import Recipe
from halfbyte.runtime.loading import load_tokenizer

_WORK = "work"
_GRADIENTS = "gradients"


def round_layers(
    plan: Plan,
    recipe: Recipe,
    out: str | Path,
    texts: Sequence[str | Path],
    options: CollectOptions | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Statistics:
    """Round the weights of a plan by a recipe with ``target: residual``, into the folder ``out``, or continue there.

    ``plan`` is ``halfbyte.plan.build.plan_to_round`` of the ``recipe``. The result belongs to its
    recipe and dialect. ``progress`` is called with layers done and their total, ``announce`` with a line where an
    earlier run is continued. Errors as of ``collect_statistics``; UnconvertibleError for a weight that its format
    cannot hold.
    """
    options = options or CollectOptions()
    out, checkpoint = Path(out), plan.checkpoint
    root = checkpoint.inventory.root
    assert root is not None
    samples = make_samples(texts, load_tokenizer(root), options.samples, options.length, options.bos)
    with Reader(checkpoint.inventory) as reader, torch.inference_mode():
        device = torch.device(options.device)
        blocks = [LayerwiseModel(checkpoint, reader, options.torch_dtype, device) for _ in range(2)]
        description = describe_run(
            checkpoint, samples, len(blocks[0].layers), replace(options, hessians=False, output_hessians=False)
        )
        description["rounded"] = rounded_by(plan, recipe)
        begin(out, description, announce)
        if description.get("complete"):
            for folder in (_WORK, _GRADIENTS):  # of a run that was killed after its last layer
                shutil.rmtree(out / folder, ignore_errors=True)
        else:
            gradients = None
            if recipe.needs_output_hessians:
                gradients = _gradients(root, out / _GRADIENTS, texts, options, announce)
            rounder = StepRounder(plan, _items(plan, recipe), blocks[0].uses, reader, device, gradients)
            _Run(blocks[0], blocks[1], rounder, samples, out, description, progress or (lambda done, total: None)).go()
    return Statistics(out)


def _gradients(
    root: Path,
    out: Path,
    texts: Sequence[str | Path],
    options: CollectOptions,
    announce: Callable[[str], None] | None,
) -> Statistics:
    """Sums over the gradients at the outputs of the source model, from a pass of its own over the same text."""
    # what is differentiated must not come from the inference mode that this runs in
    with torch.inference_mode(False):
        return collect_statistics(
            root, out, texts, replace(options, hessians=False, output_hessians=True), None, announce
        )


def _items(plan: Plan, recipe: Recipe) -> dict[str, Item]:
    """What is quantized, by name, with the methods that the recipe wants."""
    methods = methods_of(recipe, plan.checkpoint)
    return {
        item.weight.name: replace(item, method=methods.get(item.weight.name))
        for item in plan.items
        if item.action == "quantize" and len(item.weight.shape) > 1
    }


@dataclass
class _Stream:
    """A model and the files of its hidden states: one is read while the other is written."""

    blocks: LayerwiseModel
    states: list[States]

    def before(self, number: int) -> States:
        return self.states[number % 2]

    def after(self, number: int) -> States:
        return self.states[(number + 1) % 2]


class _Run:
    def __init__(
        self,
        source: LayerwiseModel,
        quantized: LayerwiseModel,
        rounder: StepRounder,
        samples: Samples,
        out: Path,
        description: dict[str, Any],
        progress: Progress,
    ) -> None:
        self.rounder, self.samples, self.out = rounder, samples, out
        self.description, self.progress = description, progress
        self.work = out / _WORK
        self.work.mkdir(exist_ok=True)
        width = source.decoder.config.hidden_size
        self.source, self.quantized = (
            _Stream(blocks, [States(self.work / f"{name}-{n}.f32", width) for n in (0, 1)])
            for name, blocks in (("source", source), ("quantized", quantized))
        )
        self.alone = (1, len(samples.tokens[0]))
        self.calls: Calls = {}

    @property
    def _name(self) -> str:
        name: str = self.description["source"]["name"]
        return name

    def go(self) -> None:
        """All layers that are not done yet, then the output matrix."""
        layers, total = self.source.blocks.layers, len(self.description["parts"])
        files = [] if self.description["done"] else [self.source.states[0], self.quantized.states[0]]
        self.calls = embed(self.source.blocks, self.samples, files, self._name, [self.alone])
        for number in range(self.description["done"], len(layers)):
            self.progress(number, total)
            self._finish(number, self._layer(number))
            release_memory()
        self.progress(total - 1, total)
        self._finish(total - 1, self._head())
        self.description["complete"] = True
        write_description(self.out, self.description)
        for folder in (_WORK, _GRADIENTS):
            shutil.rmtree(self.out / folder, ignore_errors=True)
        self.progress(total, total)

    def _finish(self, number: int, part: Part) -> None:
        write_part(self.out, self.description["parts"][number], part)
        for stream in (self.source, self.quantized):
            stream.after(number).sync()
        self.description["done"] = number + 1
        write_description(self.out, self.description)

    def _batches(self, stream: _Stream, number: int, alone: bool = False) -> Iterator[Batch]:
        """What a layer of a stream is called with; ``alone``: the first sample."""
        blocks = stream.blocks
        spans = [(slice(0, self.alone[1]), self.alone)] if alone else self.samples.batches()
        for rows, shape in spans:
            yield Batch(rows, read_batch(blocks, stream.before(number), rows, shape), self.calls[shape][number])

    def _layer(self, number: int) -> Part:
        source, quantized = self.source.blocks, self.quantized.blocks
        layer, twin = source.layers[number], quantized.layers[number]
        shelf = Shelf(self.work, self.samples.total)
        part, values = Part(), {}
        with source.filled(layer):
            steps = self._steps(layer, number)
            with watch_caches(source.attentions_of(layer)) as caches:
                run_source(
                    layer,
                    source.parameters_of(layer),
                    steps,
                    partial(self._batches, self.source, number),
                    shelf,
                    partial(self._keep, self.source, number, layer),
                    source.dtype,
                )
            part.arrays |= arrays_of(caches)
        with quantized.filled(twin):
            for step in steps:
                parameters = quantized.parameters_of(twin)
                run_quantized(
                    twin, parameters, step, partial(self._batches, self.quantized, number), shelf, quantized.dtype
                )
                rounded = self.rounder.round(step, shelf)
                part.arrays |= {name: _arrays(one) for name, one in rounded.items()}
                values = {name: one.tensor.decode() for name, one in rounded.items()}
                quantized.replace(twin, values)
            for batch in self._batches(self.quantized, number):
                # stacks that are kept may be narrower than the rest
                output = Taps(quantized.parameters_of(twin), quantized.dtype).run(twin, batch.hidden, batch.call)
                assert output is not None
                self._keep(self.quantized, number, twin, batch, output)
        shelf.clear()
        return part

    def _steps(self, layer: nn.Module, number: int) -> list[Step]:
        blocks = self.source.blocks
        parameters = blocks.parameters_of(layer)
        wanted = {t for t in parameters for name, _ in blocks.uses.get(t, ()) if name in self.rounder.items}
        first = next(self._batches(self.source, number, alone=True))
        return find_steps(
            layer, parameters, blocks.roles_of(parameters), wanted, first.hidden, first.call, blocks.dtype
        )

    def _keep(self, stream: _Stream, number: int, layer: nn.Module, batch: Batch, output: torch.Tensor) -> None:
        """Write what a layer gives to the states of the next one."""
        check_output(stream.blocks, self._name, layer, batch.hidden, batch.call, output)
        stream.after(number).write(batch.rows, as_numpy(output))

    def _head(self) -> Part:
        """The output matrix, where it is quantized, for the last states after the final norm."""
        blocks = self.source.blocks
        last = len(blocks.layers)
        output = output_matrix(blocks)
        if output is None:
            return Part()
        name, _, norm = output
        if not any(weight in self.rounder.items for weight, _ in blocks.uses.get(name, ())):
            return Part()
        shelf = Shelf(self.work, self.samples.total)
        with blocks.filled(norm):
            for key, stream in (("x", self.source), ("xh", self.quantized)):
                for rows, shape in self.samples.batches():
                    hidden = norm(read_batch(blocks, stream.before(last), rows, shape))
                    shelf.put(f"{key} {name}", rows, hidden.reshape(-1, hidden.shape[-1]))
        rounded = self.rounder.round(Step((Group((name,)),)), shelf)
        shelf.clear()
        return Part({weight: _arrays(one) for weight, one in rounded.items()})


def _arrays(rounded: Rounded) -> dict[str, NDArray[Any]]:
    kinds: dict[str, NDArray[Any]] = {"count": rounded.count, "squares": rounded.squares, "amax": rounded.amax}
    return to_arrays(rounded.tensor, rounded.objective) | kinds
