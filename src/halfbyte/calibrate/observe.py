"""What passes through a layer's matrices while it runs: sums over tokens of squares, products and maxima."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

_LINEAR = torch.nn.functional.linear
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_PICK = torch.Tensor.__getitem__
_DTYPE = torch.Tensor.dtype.__get__
_FACTS = {getattr(torch.Tensor, name).__get__ for name in ("shape", "device", "ndim", "is_meta", "requires_grad")}
_FACTS |= {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel}


@dataclass
class Sums:
    """Sums over the tokens that a matrix has seen.

    ``count`` int64 [] or [E]; ``squares`` FP64 [K] or [E, K], sum of x²; ``amax`` FP32 [] or [E]; ``hessian``
    FP32 [K, K] or [E, K, K], sum of xᵀx, or None where it is not collected. E are the experts of a stack, whose
    products are added up in one [K, K] where each its own would be too much.
    """

    count: torch.Tensor
    squares: torch.Tensor
    amax: torch.Tensor
    hessian: torch.Tensor | None

    @classmethod
    def zeros(cls, experts: tuple[int, ...], columns: int, mode: str, device: torch.device) -> Sums:
        """Nothing seen yet; ``experts`` is () or (E,), ``mode`` as ``Observer`` wants it."""
        lead = experts if mode == "own" else ()
        return cls(
            torch.zeros(experts, dtype=torch.int64, device=device),
            torch.zeros((*experts, columns), dtype=torch.float64, device=device),
            torch.zeros(experts, dtype=torch.float32, device=device),
            torch.zeros((*lead, columns, columns), device=device) if mode else None,
        )

    def add(self, x: torch.Tensor, expert: int | None) -> None:
        """Count tokens [T, K], of one expert where the matrix is a stack."""
        if not len(x):
            return
        x = x.float()
        at: Any = ... if expert is None else expert
        self.count[at] += len(x)
        self.squares[at] += x.square().sum(0, dtype=torch.float64)
        self.amax[at] = torch.maximum(self.amax[at], x.abs().amax())
        if self.hessian is not None:
            self.hessian[at if self.hessian.dim() == 3 else ...] += x.T @ x

    @property
    def is_finite(self) -> bool:
        """Whether every sum is a finite number."""
        kinds = (self.squares, self.amax, self.hessian)
        return all(bool(torch.isfinite(values).all()) for values in kinds if values is not None)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As NumPy arrays by kind."""
        sums = {"count": self.count, "squares": self.squares, "amax": self.amax, "hessian": self.hessian}
        return {kind: tensor.cpu().numpy() for kind, tensor in sums.items() if tensor is not None}


class Observer(TorchFunctionMode):
    """Within this context every product with one of the given parameters is counted.

    ``parameters``: name -> parameter. ``mode(name, parameter)`` says whether to collect products too, and for each
    expert ("own") or all of them together ("pooled"). ``sums`` holds what was seen, ``same`` the names whose inputs
    were those of another name. Nothing is counted while ``paused``.

    Stacks of another type than ``dtype`` are computed with as if they were of that type: an expert is widened when it
    is picked.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mode: Callable[[str, nn.Parameter], str],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.parameters = dict(parameters)
        self.dtype = dtype
        self.mode = mode
        self.routed: dict[str, Any] = {}
        self.sums: dict[str, Sums] = {}
        self.same: dict[str, str] = {}
        self.paused = False
        self._places = {p.untyped_storage().data_ptr(): name for name, p in self.parameters.items() if p.dim() > 1}
        self._inputs: dict[tuple[int, torch.Size], tuple[str, torch.Tensor]] = {}
        self._narrow = {id(p): name for name, p in self.parameters.items() if p.dim() == 3 and p.dtype != dtype}
        # of each of them the expert that was picked last, widened, and its number
        self._picked: dict[str, tuple[torch.Tensor, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operands, then do what was asked."""
        if self._narrow and func not in _FACTS:
            name = self._narrow.get(id(args[0])) if args else None
            if name and func == _DTYPE:
                return self.dtype
            if name and func is _PICK:
                return self._pick(name, args[0][args[1]])
            args = tuple(a.to(self.dtype) if id(a) in self._narrow else a for a in args)
        if not self.paused and (func is _LINEAR or func in _PRODUCTS) and len(args) > 1:
            self._look(args[0], args[1], func is _LINEAR)
        return func(*args, **(kwargs or {}))

    def forget_inputs(self) -> None:
        """Between forward passes: let go of the tensors that were kept to recognise shared inputs."""
        self._inputs.clear()

    def _pick(self, name: str, part: torch.Tensor) -> torch.Tensor:
        wide = part.to(self.dtype)
        if part.dim() == 2:
            self._picked[name] = wide, self._expert(name, part)
        return wide

    def _expert(self, name: str, part: torch.Tensor) -> int:
        whole = self.parameters[name]
        return int(part.storage_offset()) // (whole.shape[-1] * whole.shape[-2])

    def _find(self, weight: torch.Tensor) -> tuple[str | None, int | None]:
        """Which parameter a matrix is or lies in, and as which expert."""
        place = weight.untyped_storage().data_ptr()
        for name, (wide, expert) in self._picked.items():
            if wide.untyped_storage().data_ptr() == place:
                return name, expert
        known = self._places.get(place)
        stacked = known is not None and self.parameters[known].dim() == 3
        return known, self._expert(known, weight) if known is not None and stacked else None

    def _look(self, x: torch.Tensor, weight: torch.Tensor, turned: bool) -> None:
        name, expert = self._find(weight) if isinstance(weight, torch.Tensor) else (None, None)
        if name is None or weight.dim() != 2 or name in self.same:
            return
        whole = self.parameters[name]
        columns = x.shape[-1]
        if expert is None:
            key = (x.data_ptr(), torch.Size((x.numel(), columns)))
            known = self._inputs.setdefault(key, (name, x))[0]
            if known != name and name not in self.sums:
                self.same[name] = known
                return
        if name not in self.sums:
            experts = whole.shape[:1] if whole.dim() == 3 else ()
            self.sums[name] = Sums.zeros(tuple(experts), columns, self.mode(name, whole), x.device)
        self.sums[name].add(x.reshape(-1, columns), expert)
