"""vLLM's loader with a decoded stream of tensors, for checkpoints of the quantization method ``halfbyte``."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as LOADERS
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from halfbyte.checkpoint import Reader
from halfbyte.dialects import quantization_config_of
from halfbyte.engines.vllm_plugin import METHOD
from halfbyte.errors import CheckpointError
from halfbyte.models import Family, Piece, Weight
from halfbyte.runtime.decode import to_torch
from halfbyte.view import Checkpoint

# values decoded at a time; rows come in multiples of every format's block height and of words of zero points
_VALUES, _ROWS = 1 << 24, 1024
logger = init_logger("vllm.halfbyte")


class HalfbyteModelLoader(DefaultModelLoader):
    """Checkpoints of the method ``halfbyte`` arrive as dense tensors, everything else as ever."""

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor as an unquantized checkpoint would have them, one at a time.

        Quantized weights are computed in FP32 and rounded to the type that the model computes in.
        """
        if model_config.quantization != METHOD:
            yield from super().get_all_weights(model_config, model)
            return
        self.counter_before_loading_weights = self.counter_before_loading_weights or time.perf_counter()
        folder = _folder(model_config.model, model_config.revision, self.load_config.download_dir)
        unused = getattr(model, "is_unused_checkpoint_weight", lambda name: False)
        yield from decoded(Checkpoint.open(folder), model_config.dtype, unused)
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """As ever; with the method ``halfbyte`` a parameter that got no tensor is an error."""
        if model_config.quantization == METHOD and self.enable_weights_track is None:
            self.enable_weights_track = True
        super().load_weights(model, model_config)


def install() -> None:
    """Put the loader in the place of the default one, under whose names (auto, safetensors, ...) it goes."""
    if LOADERS.get(METHOD) is None:
        register_model_loader(METHOD)(HalfbyteModelLoader)
    for name, loader in LOADERS.items():
        if loader is DefaultModelLoader:
            # register_model_loader would warn users of every other checkpoint
            LOADERS[name] = HalfbyteModelLoader


def decoded(
    checkpoint: Checkpoint, dtype: torch.dtype, unused: Callable[[str], bool] = lambda name: False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a quantized checkpoint under the names of an unquantized one; quantized weights in ``dtype``.

    Stacks of experts come one expert and projection at a time, so that memory stays that of one matrix.
    ``unused`` says which names the model does not want; these are not read. Scales of activations are left out.
    """
    dialect, source = checkpoint.dialect, checkpoint.inventory.source
    if dialect is None:
        method = quantization_config_of(checkpoint.inventory).get("quant_method")
        said = f"is quantized by {method!r}, which halfbyte does not read" if method else "is not quantized"
        raise CheckpointError(f"{source} {said}; leave the choice of the quantization method to vLLM")
    counts = Counter(fmt.name for fmt in checkpoint.formats.values())
    logger.info("halfbyte decodes %s while loading: %s", source, ", ".join(f"{n} {c}x" for n, c in counts.items()))
    _say_left_out(checkpoint)
    with Reader(checkpoint.inventory) as reader:
        for weight in checkpoint.weights:
            if weight.name.endswith(dialect.input_scales or ()):
                continue
            if weight.name not in checkpoint.formats:
                for name in weight.sources:
                    if not unused(name):
                        yield name, to_torch(reader.read(name))
                continue
            pieces = experts_of(checkpoint.family, weight)
            if pieces[0].expert is None:
                name = pieces[0].source
                if not unused(name):
                    yield name, _whole(checkpoint, reader, weight, dtype)
                continue
            for expert, group in itertools.groupby(pieces, lambda piece: piece.expert):
                wanted = [piece for piece in group if not unused(piece.source)]
                if wanted:
                    assert expert is not None
                    values = torch.from_numpy(checkpoint.read(reader, weight, expert, expert + 1)[0])
                    for piece in wanted:
                        yield piece.source, values[slice(*(piece.rows or (None,)))].to(dtype)


def experts_of(family: Family, weight: Weight) -> tuple[Piece, ...]:
    """A stack's projections, expert by expert, as the family spells them; the weight itself where it has no spelling.

    Stacks whose unquantized form is turned or interleaved have no such spelling: engines want them whole.
    """
    if weight.pieces[0].expert is not None or len(weight.shape) != 3 or weight.interleaved or family.transposed:
        return weight.pieces
    for fused, layout in family.data.experts.items():
        ending = fused.replace("{layer}", str(weight.layer))
        if weight.name.endswith(ending):
            start = weight.name.removesuffix(ending)
            spelled = [start + part.replace("{layer}", str(weight.layer)) for part in layout.parts.values()]
            rows = [(first, stop) for _, first, stop in weight.row_parts] or [None]
            return tuple(
                Piece(name.replace("{expert}", str(expert)), expert, part)
                for expert in range(weight.shape[0])
                for name, part in zip(spelled, rows, strict=True)
            )
    return weight.pieces


def _whole(checkpoint: Checkpoint, reader: Reader, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A weight in slices of bounded size, each rounded before the next is decoded."""
    tensor = torch.empty(weight.shape, dtype=dtype)
    per = max(1, tensor[0].numel())
    step = max(1, _VALUES // per)
    if len(weight.shape) == 2:
        step = -(-step // _ROWS) * _ROWS
    for first in range(0, weight.shape[0], step):
        stop = min(first + step, weight.shape[0])
        tensor[first:stop] = torch.from_numpy(checkpoint.read(reader, weight, first, stop))
    # MXFP4 of gpt-oss lies as [E, N, K], its unquantized experts do not
    return tensor.mT.contiguous() if tensor.ndim == 3 and checkpoint.family.transposed else tensor


def _folder(model: str, revision: str | None, cache: str | None) -> Path:
    """The checkpoint on this machine; vLLM has fetched its configuration already where it is a hub id."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json"]
    return Path(snapshot_download(model, revision=revision, cache_dir=cache, allow_patterns=wanted))


def _say_left_out(checkpoint: Checkpoint) -> None:
    settings = quantization_config_of(checkpoint.inventory)
    if checkpoint.dialect and any(w.name.endswith(checkpoint.dialect.input_scales or ()) for w in checkpoint.weights):
        logger.warning("Activations are not quantized under halfbyte; their calibrated scales are left out.")
    if settings.get("kv_cache_scheme"):
        logger.warning("The checkpoint's kv_cache_scheme is left out under halfbyte; use --kv-cache-dtype.")
