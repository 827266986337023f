"""A transformers model of which only the parts in use are in memory: filled from the checkpoint, emptied again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from halfbyte.calibrate.stacks import Read, Source, fill_stack, plan_stack
from halfbyte.checkpoint import Reader
from halfbyte.errors import CheckpointError
from halfbyte.models.cache_modules import attention_of
from halfbyte.runtime.decode import to_torch
from halfbyte.runtime.loading import LazyTensor, class_of, quiet, sources_of
from halfbyte.source.checkpoint import Checkpoint

_ROWS = 4096  # of an embedding that are read at a time


class LayerwiseModel:
    """The decoder of a checkpoint, of which single layers can be filled and emptied.

    ``decoder`` is the module whose ``layers`` are run one after the other; ``uses`` says which weights of the
    checkpoint a parameter of the model holds, and for which expert where experts are modules of their own.
    Everything computes in ``dtype`` on ``device``; stacks of experts are as narrow as the checkpoint has them, and an
    ``Observer`` widens them one expert at a time.
    """

    def __init__(self, checkpoint: Checkpoint, reader: Reader, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.dtype, self.device = dtype, device
        config, model_class = class_of(checkpoint)
        # batched kernels of experts do not show which expert sees which token
        config._experts_implementation = "eager"
        for part in (config, config.get_text_config()):
            part._experts_implementation = "eager"
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        with init_empty_weights(include_buffers=False), quiet():
            self.model = model_class(config).to(dtype).eval()
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        self.decoder = self.model.get_decoder()
        if not isinstance(getattr(self.decoder, "layers", None), nn.ModuleList):
            raise CheckpointError(
                f"{model_class.__name__} has no list of decoder layers that can be run one by one; use an importance "
                "file that another tool made"
            )
        self.layers = list(self.decoder.layers)
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._read: dict[str, Read] = dict(sources_of(checkpoint, reader))
        self.uses: dict[str, list[tuple[str, int | None]]] = {}
        self._weights = {w.name: w for w in checkpoint.weights}
        self._sources: dict[str, list[Source]] = {}
        self._stacks: dict[str, list[list[str]]] = {}
        self._follow()

    def _follow(self) -> None:
        """Which parameter of the model each tensor of the source goes to."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        expected = self.model.state_dict()
        prefix = self.model.base_model_prefix
        for weight in self.checkpoint.weights:
            for piece in weight.pieces:
                target, pattern = rename_source_key(piece.source, renamings, converters, prefix, expected)
                if target not in expected:
                    continue
                expert = piece.expert if expected[target].dim() == 2 else None
                uses = self.uses.setdefault(target, [])
                if (weight.name, expert) not in uses[-1:]:
                    uses.append((weight.name, expert))
                self._sources.setdefault(target, []).append(Source(piece.source, piece.expert, pattern))
        for target, sources in self._sources.items():
            role = self._weights[self.uses[target][0][0]].role
            if role.startswith("experts.") and expected[target].dim() == 3:
                plan = plan_stack(expected[target].shape[0], sources, converters)
                if plan is not None:
                    self._stacks[target] = plan
        self._follow_tied()

    def _follow_tied(self) -> None:
        """Tied embeddings may be stored as the output matrix alone; they are then filled from there."""
        pair = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        first, last = (f"{self._names[id(m)]}.weight" if m is not None else "" for m in pair)
        tied = self.model.config.get_text_config().tie_word_embeddings
        if tied and last in self._sources and first not in self._sources:
            self._read[first] = self._read[self._sources[last][0].name]
            self._sources[first] = [Source(first, None, None)]

    def name_of(self, module: nn.Module) -> str:
        """The name of a part in the whole model."""
        return self._names[id(module)]

    def roles_of(self, targets: Iterable[str]) -> dict[str, str]:
        """The roles of what parameters hold, by their names, where the checkpoint has it."""
        held = {target: self.uses[target][0][0] for target in targets if target in self.uses}
        return {target: self._weights[name].role for target, name in held.items()}

    def columns(self, target: str) -> int:
        """How wide the inputs of a matrix of the model are."""
        weight = self._weights[self.uses[target][0][0]]
        return weight.shape[-2 if weight.transposed else -1]

    def rows(self, target: str) -> int:
        """How wide the outputs of a matrix of the model are."""
        weights = [self._weights[name] for name, expert in self.uses[target] if expert is None]
        weights = weights or [self._weights[self.uses[target][0][0]]]
        return sum(weight.shape[-1 if weight.transposed else -2] for weight in weights)

    def has(self, target: str) -> bool:
        """Whether a parameter has values of its own in the checkpoint."""
        return target in self._sources

    def outputs_of(
        self, target: str, sums: NDArray[Any]
    ) -> Iterator[tuple[str, NDArray[Any] | tuple[int, int, NDArray[Any]]]]:
        """The part of sums [..., N, N] over a parameter's outputs that belongs to each weight of the checkpoint.

        For an expert that is a module of its own: its number, how many the stack has, and its sums.
        """
        first = 0
        for name, expert in self.uses.get(target, ()):
            if expert is not None:
                yield name, (expert, self.experts_of(name), sums)
                continue
            weight = self._weights[name]
            stop = first + weight.shape[-1 if weight.transposed else -2]
            if stop <= sums.shape[-1]:
                yield name, sums[..., first:stop, first:stop]
            first = stop

    def experts_of(self, weight: str) -> int:
        """How many experts a stack of the checkpoint has."""
        return self._weights[weight].shape[0]

    def parameters_of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of a part by their names in the whole model."""
        name = self._names[id(module)]
        return {f"{name}.{parameter}" if name else parameter: p for parameter, p in module.named_parameters()}

    def attentions_of(self, module: nn.Module) -> dict[str, nn.Module]:
        """The attention modules of a part that cache keys and values, by their names in the checkpoint."""
        attentions = {}
        for target in self.parameters_of(module):
            for weight, _ in self.uses.get(target, ()):
                name = attention_of(self._weights[weight])
                if name is not None:
                    attentions[name] = self.model.get_submodule(target.removesuffix(".weight").rpartition(".")[0])
        return attentions

    @contextlib.contextmanager
    def filled(self, module: nn.Module) -> Iterator[None]:
        """A part with its weights, for as long as the context lasts."""
        wanted = self.parameters_of(module)
        with self._restored(module):
            for target in wanted.keys() & self._stacks.keys():
                self._put(target, self._stack(target, wanted[target].shape))
            self._fill(module, {s.name for t in wanted.keys() - self._stacks.keys() for s in self._sources.get(t, ())})
            yield

    def replace(self, module: nn.Module, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Give weights of the checkpoint other values [..., N, K], in the parameters of a filled part."""
        before = dict(self._read)
        names: set[str] = set()
        for weight, values in weights.items():
            stored = self._weights[weight]
            turned = stored.transposed or (values.ndim > 2 and weight in self.checkpoint.formats and self._turned)
            for piece in stored.pieces:
                names.add(piece.source)
                part = values if piece.expert is None else values[piece.expert][slice(*(piece.rows or (None,)))]
                self._read[piece.source] = _held(np.swapaxes(part, -1, -2) if turned else part)
        try:
            touched = {t for t, sources in self._sources.items() if names & {s.name for s in sources}}
            touched &= self.parameters_of(module).keys()
            for target in touched & self._stacks.keys():
                self._put(target, self._stack(target, self.model.get_parameter(target).shape))
            self._fill(module, {s.name for t in touched - self._stacks.keys() for s in self._sources[t]})
        finally:
            self._read = before

    @property
    def _turned(self) -> bool:
        return self.checkpoint.family.transposed

    def _stack(self, target: str, shape: torch.Size) -> torch.Tensor:
        plan, whole = self._stacks[target], self._sources[target][0].name
        try:
            return fill_stack(shape, plan, self._read, whole, self.dtype, self.device)
        except ValueError as error:
            source = self.checkpoint.inventory.source
            raise CheckpointError(f"{source} cannot fill {target}: it has experts of shape {error}") from error

    def _fill(self, module: nn.Module, names: set[str]) -> None:
        """Through transformers; each tensor is there twice while it is converted."""
        config = LoadStateDictConfig(
            dtype=self.dtype, device_map={"": self.device}, weight_mapping=get_model_conversion_mapping(self.model)
        )
        with quiet():
            report, _ = convert_and_load_state_dict_in_model(
                self.model, {name: LazyTensor(self._read[name]) for name in sorted(names)}, config
            )
        problems = [*report.mismatched_keys, *report.conversion_errors, *report.error_msgs]
        missing = [name for name, p in self.parameters_of(module).items() if p.is_meta]
        if problems or missing:
            shown = ", ".join(map(str, [*problems, *missing][:3]))
            raise CheckpointError(f"{self.checkpoint.inventory.source} cannot fill {self._names[id(module)]}: {shown}")

    @contextlib.contextmanager
    def embedding(self, ids: torch.Tensor) -> Iterator[None]:
        """The embedding of just these tokens, for as long as the context lasts: other rows are not kept."""
        module = self.decoder.get_input_embeddings()
        targets = list(self.parameters_of(module))
        sources = self._sources.get(targets[0], ())
        if not isinstance(module, nn.Embedding) or len(targets) > 1 or [s.pattern for s in sources] != [None]:
            with self.filled(module):
                yield
            return
        rows = ids.unique()

        def place(value: Any) -> Any:
            return torch.searchsorted(rows, value) if isinstance(value, torch.Tensor) else value

        def find(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
            return tuple(map(place, args)), {name: place(value) for name, value in kwargs.items()}

        padding = module.padding_idx
        with self._restored(module):
            self._put(targets[0], self._rows(targets[0], rows.cpu()))
            module.padding_idx = None  # may lie beyond these rows, and only matters to gradients
            handle = module.register_forward_pre_hook(find, with_kwargs=True)
            try:
                yield
            finally:
                module.padding_idx = padding
                handle.remove()

    def _rows(self, target: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix, which is read piece by piece."""
        read, (total, width) = self._read[self._sources[target][0].name], self.model.get_parameter(target).shape
        embeddings = torch.empty((len(rows), width), dtype=self.dtype, device=self.device)
        for first in range(0, total, _ROWS):
            here = (rows >= first) & (rows < first + _ROWS)
            if here.any():
                values = to_torch(read(first, min(first + _ROWS, total)))
                embeddings[here.to(self.device)] = values[rows[here] - first].to(self.device, self.dtype)
        return embeddings

    def _put(self, target: str, values: torch.Tensor) -> None:
        name, _, parameter = target.rpartition(".")
        self.model.get_submodule(name)._parameters[parameter] = nn.Parameter(values, requires_grad=False)

    @contextlib.contextmanager
    def _restored(self, module: nn.Module) -> Iterator[None]:
        """Afterwards the parameters are again those without values."""
        empty = [(part, dict(part._parameters)) for part in module.modules()]
        try:
            yield
        finally:
            for part, parameters in empty:
                part._parameters.update(parameters)


def _held(values: NDArray[Any]) -> Read:
    """What reads an array that is in memory, or some of its leading indices."""

    def read(first: int = 0, stop: int | None = None) -> NDArray[Any]:
        return np.ascontiguousarray(values[first:stop])

    return read


class _Spy(nn.Module):
    """Stands in for a layer: notes what it is called with and passes the hidden states through."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["layer"], self.__dict__["call"] = layer, call

    def __getattr__(self, name: str) -> Any:
        # models ask their layers which kind of attention they have
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.call(hidden_states, args, kwargs)
        return hidden_states


class _EnoughError(Exception):
    """Ends a forward pass that has told what was asked for."""


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def enter(blocks: LayerwiseModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
    """What the first layer gets for token ids [batch, length], and what else every layer is called with."""
    first: list[torch.Tensor] = []
    calls: list[Arguments] = []

    def note(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not first:
            first.append(hidden)
        calls.append((args, kwargs))
        if len(calls) == len(blocks.layers):
            raise _EnoughError

    layers = blocks.decoder.layers
    blocks.decoder.layers = nn.ModuleList(_Spy(layer, note) for layer in blocks.layers)
    try:
        with contextlib.suppress(_EnoughError):
            blocks.decoder(input_ids=ids, use_cache=False)
    finally:
        blocks.decoder.layers = layers
    return first[0], calls


def run_layer(layer: nn.Module, hidden: torch.Tensor, call: Arguments) -> torch.Tensor:
    """One layer over hidden states [batch, length, width]."""
    args, kwargs = call
    out = layer(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def as_numpy(values: torch.Tensor) -> NDArray[np.float32]:
    """Return a tensor as FP32 NumPy array on the CPU."""
    return values.detach().to("cpu", torch.float32).numpy()
