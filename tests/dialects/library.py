"""The compressed-tensors library as a judge: its schemes, its decompression, its name matching."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def decompress(stored: Mapping[str, NDArray[Any]], dtypes: Mapping[str, str], scheme: Any) -> Any:
    """The library's dense weight (a torch tensor) of one module; keys of ``stored`` are the module's local names."""
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress({k: to_torch(v, dtypes[k]) for k, v in stored.items()}, scheme)["weight"]


def to_torch(array: NDArray[Any], dtype: str) -> Any:
    """A torch tensor of a safetensors dtype, bit for bit."""
    import torch

    types = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}
    types["F8_E4M3"] = torch.float8_e4m3fn
    raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
    return raw.view(types[dtype]).reshape(array.shape)


def groups_of(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each Linear module the config groups whose targets match it and that the ignore list leaves to them."""
    import torch
    from compressed_tensors.utils.match import is_match

    module = torch.nn.Linear(1, 1, device="meta")
    found = {}
    for name in names:
        ignored = any(is_match(name, module, pattern) for pattern in config["ignore"])
        found[name] = [
            key
            for key, group in config["config_groups"].items()
            if not ignored and any(is_match(name, module, target) for target in group["targets"])
        ]
    return found
