"""Spellings that store modules: a declaration says how each array of a format is called and typed.

Most engines for safetensors hold a weight as a module P with a tensor for each array: ``P.weight_packed``,
``P.weight_scale`` and so on. ``ModuleSpelling`` derives everything from such a table: names, types and shapes of the
tensors, packing, and how a checkpoint is read back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np

from halfbyte.checkpoint import Inventory, TensorInfo, itemsize, numpy_dtype, safetensors_name
from halfbyte.dialects.modules import module_problem, modules, stored_bytes
from halfbyte.dialects.outputs import Array, OutputTensor
from halfbyte.dialects.spelling import Spelling, check_codes
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.formats import Format, get_format
from halfbyte.models import Weight

Shape = tuple[int, ...]


class ModulePart(NamedTuple):
    """How a module holds one array of a format.

    ``ending`` follows the module's name. ``dtype`` is the stored type, by default that of the array; bytes become words
    where it is wider. ``shape`` turns the array's shape into the stored one. ``rows``: how many of the weight's rows a
    stored row stands for, by default those of a block of the format.
    ``content``: the values of a tensor that is no array of the format, for N and K; its ``shape`` is made from (N, K).
    """

    ending: str
    dtype: str = ""
    shape: Callable[[Shape], Shape] | None = None
    rows: int | None = None
    content: Callable[[int, int], tuple[float, ...]] | None = None


class _Layout(NamedTuple):
    """One tensor of a module: ending, stored type and shape, its array, rows per row, and what it always holds."""

    ending: str
    dtype: str
    shape: Shape
    array: str
    rows: int
    content: tuple[float, ...] | None


Table = Mapping[str, str | tuple[str, str] | ModulePart]
"""Arrays of a format (``codes``, ``scales``, ``global_scale``, ``offsets``) in file order, each with an ending, an
ending and a type, or a ModulePart."""


class ModuleSpelling(Spelling):
    """Quantized weights as modules with one tensor per array; ``formats``: a table for each format, by its name.

    ``dialect`` is the name for messages. A subclass may read formats from a configuration (``format_reader``) or pack
    an array in another way. PlanError for a table that lacks an array of its format or has one too many.
    """

    def __init__(self, dialect: str, formats: Mapping[str, Table]) -> None:
        self.dialect = dialect
        self.tables = {name: _declared(dialect, get_format(name), table) for name, table in formats.items()}

    def parts(self, fmt: Format) -> dict[str, ModulePart]:
        """Return the parts of a module in a format; {} where the dialect does not have it."""
        return self.tables.get(fmt.name, {})

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Refuse formats without a table, and weights that are no modules."""
        if not self.parts(fmt):
            return f"{self.dialect} has no spelling for {fmt.name}; use the dialect halfbyte"
        return module_problem(weight, fmt, self.dialect)

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """List the tensors of each module, in the order of the table."""
        layouts: dict[Shape, list[_Layout]] = {}  # the experts of a stack are alike
        outputs: list[OutputTensor] = []
        for module in modules(weight):
            matrix = (module.n, module.k)
            if matrix not in layouts:
                layouts[matrix] = self._layouts(matrix, fmt)
            for ending, dtype, shape, array, rows, content in layouts[matrix]:
                cut = module.rows if rows else None
                outputs.append(
                    OutputTensor(module.name + ending, dtype, shape, array, module.expert, cut, rows, content)
                )
        return outputs

    def _layouts(self, matrix: tuple[int, int], fmt: Format) -> list[_Layout]:
        """What the tensors of a module of this shape are, in the order of the table."""
        layouts = []
        for array, part in self.parts(fmt).items():
            if part.content is not None:
                shape = part.shape(matrix) if part.shape else matrix
                layouts.append(_Layout(part.ending, part.dtype, shape, array, 0, part.content(*matrix)))
                continue
            kind, shape = fmt.parts(matrix)[array]
            if part.shape is not None:
                shape = part.shape(shape)
            elif np.dtype(kind).itemsize == 1:
                shape = (*shape[:-1], shape[-1] // itemsize(part.dtype))
            rows = _rows_per_row(array, fmt) if part.rows is None else part.rows
            layouts.append(_Layout(part.ending, part.dtype, shape, array, rows, None))
        return layouts

    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """View bytes as words where the stored type is wider; other arrays are stored as they are."""
        dtype = numpy_dtype(output.dtype)
        if _is_bytes(fmt, output.part) and dtype.itemsize > 1:
            return np.ascontiguousarray(part).view(dtype)
        return np.asarray(part)

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format, shape: tuple[int, ...]) -> Array:
        """View codes and one-byte scales as bytes; wide scales keep the type of the file."""
        return (stored_bytes(stored) if _is_bytes(fmt, output.part) else stored).reshape(shape)

    def format_reader(self, inventory: Inventory) -> Callable[[str], Format]:
        """Return a function that gives the format of a module, by its name: here the one whose tensors are there.

        CheckpointError where none or more than one fits.
        """
        return lambda module: self._fitting(module, inventory)

    def formats(self, inventory: Inventory) -> dict[str, Format]:
        """Return the tensors that hold codes, by name, with their formats."""
        format_of = self.format_reader(inventory)
        codes = {(parts["codes"].ending, parts["codes"].dtype) for parts in self.tables.values()}
        endings = {ending for ending, _ in codes}
        formats = {}
        for name, info in inventory.tensors.items():
            ending = next((ending for ending in endings if name.endswith(ending)), None)
            # dense weights are called .weight too, so that the type has to tell
            if ending is not None and (ending != ".weight" or (ending, info.dtype) in codes):
                formats[name] = format_of(name.removesuffix(ending))
        return formats

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Replace the tensors of each module by its weight."""
        codes = self.formats(inventory)
        weights = {name: _weight_of(name, self.parts(fmt)["codes"].ending) for name, fmt in codes.items()}
        companions = {
            _sibling(weights[name], part.ending) for name, fmt in codes.items() for part in self.parts(fmt).values()
        }
        tensors: dict[str, TensorInfo] = {}
        for name, info in inventory.tensors.items():
            if name in codes:
                check_codes(info, inventory.source)
                shape = (*info.shape[:-1], _columns(info, codes[name]))
                tensors[weights[name]] = TensorInfo(weights[name], "BF16", shape, info.file, info.offset, info.nbytes)
            elif name not in companions:
                tensors[name] = info
        return tensors, {weights[name]: fmt for name, fmt in codes.items()}

    def _fitting(self, module: str, inventory: Inventory) -> Format:
        """Return the format with the most tensors among those whose tensors the module has, in their types."""
        dtypes = {name: info.dtype for name, info in inventory.tensors.items() if name.startswith(f"{module}.")}
        fits = {
            name: len(parts)
            for name, parts in self.tables.items()
            if all(dtypes.get(module + part.ending) == part.dtype for part in parts.values())
        }
        best = [name for name, count in fits.items() if count == max(fits.values())]
        if len(best) != 1:
            raise CheckpointError(
                f"the tensors of {module} in {inventory.source} are those of {' and '.join(best) or 'no format'} in "
                f"{self.dialect}; its format is unknown"
            )
        return get_format(best[0])


def _declared(dialect: str, fmt: Format, table: Table) -> dict[str, ModulePart]:
    """Complete the declaration of a format by the types of its arrays."""
    parts = {name: ModulePart(*((part,) if isinstance(part, str) else part)) for name, part in table.items()}
    arrays = {name: safetensors_name(np.dtype(kind)) for name, (kind, _) in fmt.parts((128, 256)).items()}
    declared = {name for name, part in parts.items() if part.content is None}
    if declared != set(arrays):
        raise PlanError(
            f"the spelling of {fmt.name} in {dialect} must name {', '.join(arrays)}, and it names {', '.join(declared)}"
        )
    return {name: part._replace(dtype=part.dtype or arrays[name]) for name, part in parts.items()}


def _rows_per_row(array: str, fmt: Format) -> int:
    """Rows of the weight per row of an array, 0 where one number stands for all of them."""
    if array == "codes":
        return 1
    return 0 if array == "global_scale" else max(fmt.block[0], 0)


@cache
def _is_bytes(fmt: Format, array: str) -> bool:
    return np.dtype(fmt.parts((128, 256))[array][0]).itemsize == 1


def _columns(info: TensorInfo, fmt: Format) -> int:
    """Columns of the weight whose rows of codes are stored here."""
    row = info.shape[-1] * itemsize(info.dtype)
    return row * 256 // int(fmt.parts((2, 256))["codes"][1][-1])


def _weight_of(codes: str, ending: str) -> str:
    """Return the weight's name for its codes: ``P.weight`` for ``P.weight_packed``; a stack T in one tensor is T."""
    if ending.startswith(".weight"):
        return codes.removesuffix(ending.removeprefix(".weight"))
    return f"{codes.removesuffix(ending)}.weight"


def _sibling(weight: str, ending: str) -> str:
    """Return another tensor beside a weight: ``P.weight`` has ``P.weight_scale``, a stack T has ``T_scale``."""
    if ending.startswith(".weight"):
        return weight + ending.removeprefix(".weight")
    return weight.removesuffix(".weight") + ending
