"""Rounding activations as engines with FP4 or FP8 arithmetic do, on hardware that has neither.

Inputs of layers whose weights are quantized are rounded to a format and decoded again, in FP32, bit for bit as
``halfbyte.encode(x, format, "absmax").decode()`` does it:

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
from halfbyte.source.checkpoint import Checkpoint

FORMATS = {
    "nvfp4": get_format("nvfp4"),
    "mxfp4": get_format("mxfp4"),
    "fp8": BlockFormat("fp8_token", (E4M3,), FP32, (1, -1)),
}
"""The formats that activations are rounded to; rows are tokens."""

Rounded = Callable[[torch.Tensor], torch.Tensor]
_SMALLEST = 2.0**-126
_MATRIX_PRODUCTS = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)


def rounded(x: torch.Tensor, name: str, global_scale: float | None = None) -> torch.Tensor:
    """``x`` [..., K] rounded to the format ``name`` along K, in its own dtype."""
    flat = x.reshape(-1, x.shape[-1]).float()
    columns = FORMATS[name].block[1]
    if columns > 0 and flat.shape[1] % columns:
        raise HalfbyteError(
            f"activations of {flat.shape[1]} channels do not divide into blocks of {columns}; choose other activations"
        )
    values = {"nvfp4": _nvfp4, "mxfp4": _mxfp4, "fp8": _fp8}[name](flat, global_scale)
    # a format saturates; what is not finite must not be made to look like its largest value
    values = torch.where(torch.isfinite(flat), values, torch.nan)
    return values.reshape(x.shape).to(x.dtype)


def _nvfp4(x: torch.Tensor, global_scale: float | None) -> torch.Tensor:
    if global_scale is None:
        amax = x.abs().amax()
        alpha = torch.where(amax == 0, 1.0, (amax / 2688.0).clamp_min(_SMALLEST))
    else:
        alpha = torch.tensor(global_scale, dtype=torch.float32, device=x.device)
    y = (x * (1.0 / alpha)).unflatten(1, (-1, 16))
    amax = y.abs().amax(dim=2, keepdim=True)
    # a block that is not zero has no scale of zero
    scale = (amax / 6.0).clamp_max(448.0).to(torch.float8_e4m3fn).float().clamp_min(2.0**-9)
    values = _e2m1(y * (1.0 / scale)) * (scale * alpha)
    return torch.where(amax == 0, 0.0, values).flatten(1)


def _mxfp4(x: torch.Tensor, _: float | None) -> torch.Tensor:
    blocks = x.unflatten(1, (-1, 32))
    amax = blocks.abs().amax(dim=2, keepdim=True)
    code = (torch.frexp(torch.where(amax == 0, 1.0, amax)).exponent - 1 - 2 + 127).clamp(0, 254).int()
    # 2 ** (code - 127) by its bits, since 2 ** -127 is subnormal
    scale = torch.where(code == 0, 1 << 22, code << 23).int().view(torch.float32)
    values = _e2m1(blocks * (1.0 / scale)) * scale
    return torch.where(amax == 0, 0.0, values).flatten(1)


def _fp8(x: torch.Tensor, _: float | None) -> torch.Tensor:
    amax = x.abs().amax(dim=1, keepdim=True)
    scale = torch.where(amax == 0, 1.0, amax) / 448.0
    return (x * (1.0 / scale)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale


def _e2m1(z: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, .5, 1, 1.5, 2, 3, 4, 6, halves to the even code, beyond 6 to 6; the sign is kept."""
    a = z.abs()
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return torch.copysign(((a / step).round() * step).clamp_max(6.0), z)


def round_activations(model: Any, checkpoint: Checkpoint, name: str) -> int:
    """Make a model round the inputs of all layers whose weights are quantized; how many layers these are.

    Linear layers and stacks of experts (both products of each expert). HalfbyteError where another kind of layer is
    quantized, or none.
    """
    if name not in FORMATS:
        raise HalfbyteError(f"activations cannot be rounded to {name!r}; there are {', '.join(FORMATS)}")
    weights = [w for w in checkpoint.weights if w.name in checkpoint.formats and bare_role(w.role) != "embedding"]
    found = places(model, weights)
    if not found:
        raise HalfbyteError(
            f"{checkpoint.inventory.source} has no quantized layers that halfbyte knows of, so there are no "
            "activations to round"
        )
    scales = _input_scales(checkpoint) if name == "nvfp4" else {}
    modules: dict[str, tuple[float | None, Turn]] = {}
    with Reader(checkpoint.inventory) as reader:
        for weight in weights:
            if weight.name in found:
                path = found[weight.name].rpartition(".")[0]
                turn = _turn(checkpoint, reader, weight)
                if modules.get(path, (None, turn))[1] != turn:
                    raise HalfbyteError(f"weights of {path} are rotated in different ways; their inputs have one")
                modules[path] = scales.get(weight.sources[0].rpartition(".")[0]), turn
    for path, (scale, turn) in modules.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_before(partial(turn.rounded, name=name, global_scale=scale)))
        elif any(tensor.dim() == 3 for tensor in module.state_dict().values()):
            _in_experts(module, partial(turn.rounded, name=name))
        else:
            raise HalfbyteError(f"the inputs of {path} ({type(module).__name__}) cannot be rounded")
    return len(modules)


@dataclass(frozen=True)
class Turn:
    """The rotation of a layer's inputs: in blocks of ``size`` (0: none), by ``steps`` [K/size][...] as they are stored
    or, without any, by the Hadamard matrix."""

    size: int = 0
    steps: tuple[tuple[int, ...], ...] = ()

    def rounded(self, x: torch.Tensor, name: str, global_scale: float | None = None) -> torch.Tensor:
        """``x`` [..., K] rounded in rotated space, where an engine rounds it, and turned back."""
        if not self.size:
            return rounded(x, name, global_scale)
        swaps = torch.tensor(self.steps, dtype=torch.uint8, device=x.device) if self.steps else None
        turned = rotated(x.reshape(-1, x.shape[-1]).float(), self.size, swaps)
        return unrotated(rounded(turned, name, global_scale), self.size, swaps).reshape(x.shape).to(x.dtype)


def _turn(checkpoint: Checkpoint, reader: Reader, weight: Weight) -> Turn:
    fmt = checkpoint.formats[weight.name]
    if fmt.rotation is None:
        return Turn()
    if not fmt.rotation.steps:
        return Turn(fmt.block[1])
    if len(weight.shape) > 2:
        raise HalfbyteError(
            f"the experts of {weight.name} have a rotation each, which rounded activations cannot follow; evaluate "
            "without them, or rotate experts by `hadamard`"
        )
    stored = checkpoint.read_quantized(reader, weight, 0, 1).rotation
    assert stored is not None
    return Turn(fmt.block[1], tuple(map(tuple, stored.tolist())))


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
