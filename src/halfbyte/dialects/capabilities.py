"""What a dialect may have beside its spelling; each class as it stands is what plain checkpoints do.

``UnquantizedLayout``: unquantized weights under other names, cut, transposed or in another type. ``ActivationScales``:
how engines quantize the inputs of weights. ``Package``: the files around the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from halfbyte.checkpoint import Inventory, Reader, numpy_dtype
from halfbyte.dialects.outputs import Array, Container, InputScale, OutputChunk, OutputTensor
from halfbyte.dialects.quantization_config import quantization_config_of
from halfbyte.formats import Format
from halfbyte.models import Weight


class UnquantizedLayout:
    """How files hold weights that are not quantized: here as the source does."""

    def omitted(self, weight: Weight) -> str | None:
        """Say why the dialect's readers have no use for a weight, which is then not written; None: it is written."""
        return None

    def outputs(self, weight: Weight, outputs: list[OutputTensor]) -> list[OutputTensor]:
        """List the tensors that hold a weight. ``outputs`` are those of the source, with ``copy`` as their part.

        Others are filled by ``write`` from the weight's values. PlanError if there is no place for it.
        """
        return outputs

    def write(self, outputs: Sequence[OutputTensor], values: Array, first: int) -> Iterator[OutputChunk]:
        """Cut leading indices from ``first`` on of a weight into stored arrays.

        Here each output holds all of them (``values``), or their last two axes swapped (``transposed``).
        """
        for output in outputs:
            array = np.swapaxes(values, -1, -2) if output.part == "transposed" else values
            start = first * math.prod(output.shape[1:])
            yield OutputChunk(output, start, np.ascontiguousarray(array.astype(numpy_dtype(output.dtype), copy=False)))

    def read(self, reader: Reader, weight: Weight, first: int, stop: int) -> Array | None:
        """Read leading indices first..stop of a weight that ``write`` wrote; None: it lies as in a source."""
        return None

    def names(self, weight: Weight) -> list[str]:
        """List the tensors of the dialect's files that hold a weight."""
        return list(weight.sources)


class ActivationScales:
    """How engines quantize the inputs of quantized weights: here not at all.

    ``endings``: of the names of tensors that hold calibrated scales of activations, not of weights.
    """

    endings: tuple[str, ...] = ()

    def scale(self, fmt: Format) -> InputScale | None:
        """Return how the scale of a module's activations is stored beside weights in a format, if engines use one."""
        return None

    def problem(self, fmt: Format, kind: str) -> str | None:
        """Say why engines cannot quantize inputs beside a format so (none, dynamic, static); None if they can."""
        return None if kind == "none" else f"engines of this dialect take no {kind} activations beside {fmt.name}"

    def stated(self, inventory: Inventory, weight: Weight) -> dict[str, Any] | None:
        """Return how a checkpoint's configuration quantizes the inputs of a weight ({}: not at all).

        None: it does not say.
        """
        return None

    def takes_scales(self, inventory: Inventory) -> Callable[[Weight, Format, str], bool]:
        """Return a function of a quantized weight, its format and one of its modules.

        It tells whether engines take the scale of the module's inputs from the file. Here none do.
        """
        return lambda weight, fmt, module: False


class Package:
    """The files around the weights: here safetensors files, config.json and what the source has beside them.

    ``files``: names of files that only this dialect's readers look at. ``standalone``: the weight files hold
    configuration and tokenizer, so that nothing but halfbyte.json lies beside them; by default they are one file.
    """

    files: tuple[str, ...] = ()
    standalone: bool = False

    def container(
        self, inventory: Inventory, recipe: str, tensors: Sequence[tuple[Weight, Format | None, list[OutputTensor]]]
    ) -> Container:
        """Return how the tensors of a conversion of ``inventory`` lie in files; PlanError if it lacks something."""
        return Container()

    def config_json(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the output's config.json, from the source's with ``quantization_config``.

        PlanError if engines would misread it.
        """
        return config

    def original_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the source's config.json: the inverse of ``config_json``."""
        return dict(config)

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, bytes]:
        """Return further files (name -> content) for a ``quantization_config`` that ``Dialect.config`` made."""
        return {}

    def inherited(self, inventory: Inventory) -> dict[str, Any]:
        """Return settings of a source that are not about weights; its outputs in the same dialect keep them."""
        scheme = quantization_config_of(inventory).get("kv_cache_scheme")
        return {"kv_cache_scheme": scheme} if scheme else {}

    def differences(self, source: Inventory) -> list[str]:
        """List what the configuration and tokenizer of a ``standalone`` output have otherwise than the source."""
        return []
