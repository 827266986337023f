"""The way back through a model, one layer in memory: gradients of a sampled log-likelihood, from the head to layer 0.

The states before every layer lie in files. A layer is run once more with them, now with a backward pass, which takes
the gradient at its output and leaves that at its input for the layer before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from halfbyte.calibrate.hidden_states import read_batch
from halfbyte.calibrate.layerwise import Arguments, LayerwiseModel, as_numpy, run_layer
from halfbyte.calibrate.output_gradients import CLIP, GradientObserver
from halfbyte.calibrate.states import States
from halfbyte.calibration.statistics import Part
from halfbyte.errors import MeasurementError

SEED = 17
_LOGITS = 1 << 25  # at a time
Batches = Callable[[], Iterator[tuple[slice, tuple[int, int]]]]


class ReversePass:
    """Gradients of all samples, layer by layer in reverse; ``states`` [layers + 1] are those between the layers.

    A stack of experts whose sums would need more than ``limit`` bytes has none. ``announce`` is told of modules whose
    gradients come from a few tokens.
    """

    def __init__(
        self,
        blocks: LayerwiseModel,
        states: Sequence[States],
        work: Path,
        batches: Batches,
        limit: int,
        announce: Callable[[str], None],
    ) -> None:
        self.blocks, self.states, self.batches = blocks, states, batches
        self.limit, self.announce = limit, announce
        self.gradients = [States(work / f"gradients-{number}.f32", states[0].width) for number in (0, 1)]

    def begin(self) -> None:
        """Write the gradients after the last layer, from tokens drawn for every position."""
        model = self.blocks.model
        norm, head, embedding = self.blocks.decoder.norm, model.get_output_embeddings(), model.get_input_embeddings()
        name = f"{self.blocks.name_of(head)}.weight"
        tied = not self.blocks.has(name)
        with self.blocks.filled(norm), self.blocks.filled(embedding if tied else head), torch.enable_grad():
            _freeze(norm, head, embedding)

            def logits_of(x: torch.Tensor) -> torch.Tensor:
                return _scaled(linear(x, embedding.weight) if tied else head(x), model.config.get_text_config())

            for rows, shape in self.batches():
                hidden = read_batch(self.blocks, self.states[-1], rows, shape).requires_grad_()
                outputs = norm(hidden)
                # the same draws wherever an interrupted run continues
                generator = torch.Generator(self.blocks.device).manual_seed(SEED + rows.start)
                outputs.backward(_gradient_of_draws(outputs, logits_of, generator))
                assert hidden.grad is not None
                self.gradients[0].write(rows, as_numpy(hidden.grad))
        self.gradients[0].sync()

    def layer(self, number: int, calls: dict[tuple[int, int], list[Arguments]]) -> Part:
        """Sums of gᵀg of a layer's matrices; the gradient at its input is written for the layer before."""
        layer = self.blocks.layers[number]
        step = len(self.blocks.layers) - 1 - number
        after, before = self.gradients[step % 2], self.gradients[(step + 1) % 2]
        with self.blocks.filled(layer), torch.enable_grad():
            _freeze(layer)
            parameters = self.blocks.parameters_of(layer)
            observer = GradientObserver(parameters, self._wanted(parameters), self.blocks.dtype)
            for rows, shape in self.batches():
                hidden = read_batch(self.blocks, self.states[number], rows, shape).requires_grad_()
                with observer:
                    result = run_layer(layer, hidden, calls[shape][number])
                result.backward(read_batch(self.blocks, after, rows, shape))
                assert hidden.grad is not None
                before.write(rows, as_numpy(hidden.grad))
                observer.end_batch()
                observer.forget_inputs()
        before.sync()
        return self._by_weight(observer)

    def _wanted(self, parameters: dict[str, nn.Parameter]) -> list[str]:
        """Matrices of the checkpoint, and stacks that have room for a sum each."""
        names = []
        for name, parameter in parameters.items():
            if parameter.dim() not in (2, 3) or not self.blocks.uses.get(name):
                continue
            experts = parameter.shape[0] if parameter.dim() == 3 else 1
            if experts == 1 or experts * self.blocks.rows(name) ** 2 * 4 <= self.limit:
                names.append(name)
        return names

    def _by_weight(self, observer: GradientObserver) -> Part:
        """From the model's parameters to the checkpoint's weights; MeasurementError for sums that are not finite."""
        part = Part()
        for target, sums in observer.outputs.items():
            if not bool(torch.isfinite(sums).all()):
                raise MeasurementError(
                    f"the gradients at the outputs of {target} are not finite, so they say nothing; compute with "
                    "--dtype float32, or calibrate without --output-hessians"
                )
            for weight, kinds in self.blocks.outputs_of(target, sums.cpu().numpy()):
                if isinstance(kinds, tuple):
                    expert, experts, array = kinds
                    stack = part.arrays.setdefault(weight, {})
                    if "output_hessian" not in stack:
                        stack["output_hessian"] = array[None].repeat(experts, axis=0) * 0
                    stack["output_hessian"][expert] = array
                else:
                    part.arrays[weight] = {"output_hessian": kinds}
        shares = observer.concentrated()
        if shares:
            name, share = max(shares.items(), key=lambda entry: entry[1])
            more = f" and {len(shares) - 1} more" if len(shares) > 1 else ""
            self.announce(
                f"one token in a thousand holds {share:.0%} of the squared gradients at {name}{more}; gradients are "
                f"shortened to {CLIP:g} times their median, but look for odd tokens in the text"
            )
        return part


def _freeze(*modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(False)


def _scaled(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Logits as the model's own forward pass makes them of the output matrix's products."""
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def _gradient_of_draws(
    outputs: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """The gradient, at what the output matrix reads, of the negative log-likelihood of tokens drawn for each place."""
    flat = outputs.detach().reshape(-1, outputs.shape[-1])
    gradient = torch.empty_like(flat)
    with torch.no_grad():
        step = max(16, _LOGITS // logits_of(flat[:1]).shape[-1])
    for first in range(0, len(flat), step):
        x = flat[first : first + step].clone().requires_grad_()
        logits = logits_of(x).float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        cross_entropy(logits, drawn, reduction="sum").backward()
        assert x.grad is not None
        gradient[first : first + step] = x.grad
    return gradient.view_as(outputs)
