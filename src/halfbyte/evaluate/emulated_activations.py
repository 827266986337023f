"""Rounding activations as engines with FP4 or FP8 arithmetic do, on hardware that has neither.

Inputs of layers with quantized weights are encoded in a format by the search ``absmax`` and decoded again, to FP32:

- ``nvfp4``: E2M1 in blocks of 16 with E4M3 scales under a global scale: the checkpoint's calibrated one where it has
  one for the layer, else amax / 2688 of all tokens that the layer sees in a call.
- ``mxfp4``: E2M1 in blocks of 32 with power-of-two scales by the OCP floor rule.
- ``fp8``: E4M3 with a FP32 scale per token, amax / 448.

Where weights are rotated, their inputs are rounded in rotated space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from halfbyte.checkpoint import Reader
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.placement import places
from halfbyte.formats import BlockFormat, get_format
from halfbyte.formats.codebooks import E4M3
from halfbyte.formats.scales import FP32
from halfbyte.models import Weight
from halfbyte.models.roles import bare_role
from halfbyte.runtime.remote.halfbyte_rotation import rotated, unrotated
from halfbyte.search import encode
from halfbyte.source.checkpoint import Checkpoint

FORMATS = {
    "nvfp4": get_format("nvfp4"),
    "mxfp4": get_format("mxfp4"),
    "fp8": BlockFormat("fp8_token", (E4M3,), FP32, (1, -1)),
}
"""The formats that activations are rounded to; rows are tokens."""

Rounded = Callable[[torch.Tensor], torch.Tensor]
_MATRIX_PRODUCTS = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)


def rounded(x: torch.Tensor, name: str, global_scale: float | None = None) -> torch.Tensor:
    """``x`` [..., K] rounded to the format ``name`` along K, in its own dtype."""
    flat = x.reshape(-1, x.shape[-1]).float()
    columns = FORMATS[name].block[1]
    if columns > 0 and flat.shape[1] % columns:
        raise HalfbyteError(
            f"activations of {flat.shape[1]} channels do not divide into blocks of {columns}; choose other activations"
        )
    if not flat.numel():
        return x
    # a format saturates; what is not finite must not be made to look like its largest value
    finite = torch.isfinite(flat)
    has_scale = FORMATS[name].has_global_scale and global_scale is not None
    scale = np.float32(global_scale) if has_scale else None
    array = torch.where(finite, flat, 0.0).cpu().numpy()
    values = torch.from_numpy(encode(array, FORMATS[name], "absmax", global_scale=scale).decode()).to(x.device)
    return torch.where(finite, values, torch.nan).reshape(x.shape).to(x.dtype)


def round_activations(
    model: Any, checkpoint: Checkpoint, name: str, around: Callable[[Rounded], Rounded] = lambda how: how
) -> int:
    """Make a model round the inputs of all layers whose weights are quantized; how many layers these are.

    Linear layers and stacks of experts (both products of each expert). ``around`` wraps what rounds a tensor (training
    lets gradients pass). HalfbyteError where another kind of layer is quantized, or none.
    """
    if name not in FORMATS:
        raise HalfbyteError(f"activations cannot be rounded to {name!r}; there are {', '.join(FORMATS)}")
    weights = [w for w in checkpoint.weights if w.name in checkpoint.formats and bare_role(w.role) != "embedding"]
    parameters = places(model, weights)
    if not parameters:
        raise HalfbyteError(
            f"{checkpoint.inventory.source} has no quantized layers that halfbyte knows of, so there are no "
            "activations to round"
        )
    scales = _input_scales(checkpoint) if name == "nvfp4" else {}
    modules: dict[str, tuple[float | None, InputRotation]] = {}
    with Reader(checkpoint.inventory) as reader:
        for weight in weights:
            if weight.name in parameters:
                path = parameters[weight.name].rpartition(".")[0]
                rotation = _input_rotation(checkpoint, reader, weight)
                if modules.get(path, (None, rotation))[1] != rotation:
                    raise HalfbyteError(f"weights of {path} are rotated in different ways; their inputs have one")
                modules[path] = scales.get(weight.sources[0].rpartition(".")[0]), rotation
    for path, (scale, rotation) in modules.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_before(around(partial(rotation.rounded, name=name, global_scale=scale))))
        elif any(tensor.dim() == 3 for tensor in module.state_dict().values()):
            _in_experts(module, around(partial(rotation.rounded, name=name)))
        else:
            raise HalfbyteError(f"the inputs of {path} ({type(module).__name__}) cannot be rounded")
    return len(modules)


@dataclass(frozen=True)
class InputRotation:
    """The rotation of a layer's inputs: in blocks of ``size`` (0: none), by ``steps`` [K/size][...] as they are stored
    or, without any, by the Hadamard matrix."""

    size: int = 0
    steps: tuple[tuple[int, ...], ...] = ()

    def rounded(self, x: torch.Tensor, name: str, global_scale: float | None = None) -> torch.Tensor:
        """``x`` [..., K] rounded in rotated space, where an engine rounds it, and rotated back."""
        if not self.size:
            return rounded(x, name, global_scale)
        swaps = torch.tensor(self.steps, dtype=torch.uint8, device=x.device) if self.steps else None
        in_blocks = rotated(x.reshape(-1, x.shape[-1]).float(), self.size, swaps)
        return unrotated(rounded(in_blocks, name, global_scale), self.size, swaps).reshape(x.shape).to(x.dtype)


def _input_rotation(checkpoint: Checkpoint, reader: Reader, weight: Weight) -> InputRotation:
    fmt = checkpoint.formats[weight.name]
    if fmt.rotation is None:
        return InputRotation()
    if not fmt.rotation.steps:
        return InputRotation(fmt.block[1])
    if len(weight.shape) > 2:
        raise HalfbyteError(
            f"the experts of {weight.name} have a rotation each, which rounded activations cannot follow; evaluate "
            "without them, or rotate experts by `hadamard`"
        )
    stored = checkpoint.read_quantized(reader, weight, 0, 1).rotation
    assert stored is not None
    return InputRotation(fmt.block[1], tuple(map(tuple, stored.tolist())))


def _before(how: Rounded) -> Callable[..., Any]:
    return lambda module, args: (how(args[0]), *args[1:])


def _in_experts(module: Any, how: Rounded) -> None:
    """Round what enters the matrix products inside a stack of experts, in the class's own loop over experts."""
    kind = type(module)
    loop = getattr(kind.forward, "__wrapped__", kind.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Rounding(how) as mode:
            result = loop(module, *args, **kwargs)
        if mode.products < 2:
            raise HalfbyteError(f"{kind.__name__} multiplies in a way that is not known, so its inputs are not rounded")
        return result

    module.forward = forward


class _Rounding(TorchFunctionMode):
    """Rounds the first operand of every matrix product."""

    def __init__(self, how: Rounded) -> None:
        super().__init__()
        self.how, self.products = how, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MATRIX_PRODUCTS:
            self.products += 1
            args = (self.how(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _input_scales(checkpoint: Checkpoint) -> dict[str, float]:
    """Calibrated global scales of NVFP4 activations by module, as multipliers."""
    dialect, nvfp4 = checkpoint.dialect, get_format("nvfp4")
    scale = dialect.activations.scale(nvfp4) if dialect is not None else None
    if scale is None or checkpoint.inventory.root is None:
        return {}
    names = [name for name in checkpoint.inventory.tensors if name.endswith(scale.ending)]
    with Reader(checkpoint.inventory) as reader:
        values = {n.removesuffix(scale.ending): float(reader.read(n).reshape(-1)[0]) for n in names}
    return {module: 1 / value if scale.global_scale_inv else value for module, value in values.items() if value}
