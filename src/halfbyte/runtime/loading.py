"""``load``: any checkpoint that halfbyte reads, as a transformers model in eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from halfbyte.checkpoint import Reader
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.kernels.linear import isa
from halfbyte.kernels.linear_native import MODES
from halfbyte.models import Piece
from halfbyte.runtime.decode import to_torch
from halfbyte.runtime.packed_quantizer import Packing, packing_of
from halfbyte.runtime.products import Mode
from halfbyte.runtime.remote.halfbyte_quantizer import METHOD, say_left_out
from halfbyte.source.checkpoint import Checkpoint

# roles of tensors that a model class may have no place for
_OPTIONAL = ("mtp.", "vision.", "audio.", "buffer", "quantized.")
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    dequantize: bool = False,
    device: torch.device | str | None = None,
    revision: str | None = None,
    mode: str = "exact",
) -> Any:
    """A transformers model, in eval mode, of a plain checkpoint or one of any dialect.

    ``path``: folder, .safetensors file beside its config.json, or hub id (with ``revision``). The class is the one
    that config.json names. ``dtype`` (default: the config's) is what weights are rounded to after decoding in FP32.

    Quantized weights stay as small as they are in the file and are multiplied on the CPU by compiled products
    (``halfbyte.kernels.linear``) in this ``mode``: "exact", "int8" (activations are rounded to int8 in groups of 32)
    or "auto". ``dequantize`` makes an ordinary dense model instead. Where there is no compiled product (another
    ``device``, or a format that has none), weights of the dialect ``halfbyte`` are decoded at every call, which is
    slow, those of others once, while loading; the log says so.

    Nothing is ever initialised at random: CheckpointError if a tensor of the model is missing, has another shape, or
    has no place in it; multi-token-prediction and vision tensors that the class does without are named in the log.
    """
    checkpoint = Checkpoint.open(path, revision)
    config, model_class = class_of(checkpoint)
    kind = _torch_dtype(dtype)
    if mode not in MODES:
        raise HalfbyteError(f"unknown mode {mode!r}; there are {', '.join(MODES)}")
    on_cpu = device is None or torch.device(device).type == "cpu"
    packing = Packing(checkpoint, Mode(mode)) if checkpoint.formats and on_cpu and not dequantize and isa() else None
    is_halfbyte = checkpoint.dialect is not None and checkpoint.dialect.name == "halfbyte"
    if is_halfbyte and not dequantize and not (packing and all(map(packing.can_pack, packing.weights))):
        # what has no product is decoded at every call, by the code that travels with checkpoints
        with packing_of(packing):
            root = checkpoint.inventory.root
            model = _strictly(checkpoint, model_class, root, config=config, dtype=kind or "auto")[0]
    else:
        model = _from_tensors(checkpoint, config, model_class, kind, packing)
    return model.to(device) if device is not None else model


def load_tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """The tokenizer that lies beside a checkpoint; CheckpointError if there is none."""
    root = Checkpoint.open(path, revision).inventory.root
    # without any of these files transformers may make up an empty tokenizer
    if root is None or not any(vocabulary for pattern in _VOCABULARIES for vocabulary in root.glob(pattern)):
        raise CheckpointError(f"{path} has no tokenizer (a file such as tokenizer.json); put it beside the weights")
    try:
        return transformers.AutoTokenizer.from_pretrained(root, trust_remote_code=False)
    except Exception as error:  # each tokenizer class has errors of its own
        raise CheckpointError(f"transformers cannot load the tokenizer of {path} ({error})") from error


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """None and "auto" leave the choice to the config."""
    kind = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto"):
        return None
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point and kind.itemsize > 1):
        raise HalfbyteError(f"models cannot compute in {dtype!r}; use float32, bfloat16 or float16")
    return kind


def class_of(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The config object and the model class; never code of the checkpoint's own."""
    inventory = checkpoint.inventory
    settings = inventory.config.get("quantization_config")
    if checkpoint.dialect is None and settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise CheckpointError(f"{inventory.source} is quantized by {method!r}, which halfbyte does not read")
    try:
        config = transformers.AutoConfig.from_pretrained(inventory.root, trust_remote_code=False)
    except Exception as error:  # each config class has errors of its own for values that it does not expect
        raise CheckpointError(
            f"transformers does not know the model of {inventory.source} ({_short(error)})"
        ) from error
    names = inventory.config.get("architectures") or []
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    model_class = next((candidate for name in names if (candidate := _model_class(name, config)) is not None), None)
    if model_class is None:
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) not in mapping:
            raise CheckpointError(f"transformers has no class for {names or config.model_type} of {inventory.source}")
        model_class = mapping[type(config)]
    return config, model_class


def _model_class(name: str, config: Any) -> Any:
    """A model class of transformers for just this kind of config; None for any other thing of that name.

    Names come from strangers: auto classes, for one, would ask whether to run a checkpoint's own code.
    """
    candidate = getattr(transformers, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not (isinstance(candidate, type) and issubclass(candidate, transformers.PreTrainedModel)):
        return None
    config_class = getattr(candidate, "config_class", None)
    parts = (config, *(part for part in [config.get_text_config()] if part is not config))
    return (
        candidate if isinstance(config_class, type) and any(isinstance(part, config_class) for part in parts) else None
    )


def _strictly(checkpoint: Checkpoint, model_class: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """``from_pretrained`` whose report of missing, misshapen or unplaced tensors is an error."""
    source = checkpoint.inventory.source
    try:
        with quiet():
            model, report = model_class.from_pretrained(
                *args, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **kwargs
            )
    except HalfbyteError:
        raise
    except Exception as error:  # each model class has errors of its own for a config that it does not expect
        raise CheckpointError(f"{source} cannot be loaded: {_short(error)}") from error
    missing = [name for key in ("missing_keys", "mismatched_keys", "error_msgs") for name in report.get(key) or ()]
    if missing:
        raise CheckpointError(f"{source} lacks tensors of {model_class.__name__}: {_some(missing)}")
    return model, report


def _from_tensors(
    checkpoint: Checkpoint, config: Any, model_class: Any, dtype: torch.dtype | None, packing: Packing | None
) -> Any:
    """Weights under the names of an unquantized checkpoint, through transformers' own renamings.

    All that ``packing`` does not take are decoded.
    """
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    # names no file, so that transformers without halfbyte stops
    config.transformers_weights = None
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(Reader(checkpoint.inventory))
        tensors = {name: LazyTensor(read, _kind(checkpoint, read)) for name, read in sources_of(checkpoint, reader)}
        if packing is not None:
            packing.tensors = tensors
            config.quantization_config = {"quant_method": METHOD, **packing.stated()}
            stack.enter_context(packing_of(packing))
        kind = dtype or getattr(config, "dtype", None) or _dtype(checkpoint)
        model, report = _strictly(checkpoint, model_class, None, config=config, state_dict=tensors, dtype=kind)
    unread = {name for name, tensor in tensors.items() if not tensor.was_read}
    roles = {name: weight.role for weight in checkpoint.weights for name in weight.sources}
    reported = set(report.get("unexpected_keys") or ())
    lost = [n for n in sorted(unread) if n in reported and not roles[n].startswith(_OPTIONAL)]
    if lost:
        raise CheckpointError(
            f"{model_class.__name__} has no place for tensors of {checkpoint.inventory.source}: {_some(lost)}"
        )
    if packing is None:  # what packs has said so
        say_left_out(sorted(unread), model_class.__name__)
    return model


def _kind(checkpoint: Checkpoint, read: Callable[..., Any]) -> str:
    """The type of what ``sources_of`` reads: stored or decoded."""
    if isinstance(read, partial) and len(read.args) == 1:
        return checkpoint.inventory.tensors[read.args[0]].dtype
    return "F32"


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Of the largest unquantized weight."""
    floats = {"BF16": torch.bfloat16, "F16": torch.float16}
    largest = max(checkpoint.weights, key=lambda w: int(np.prod(w.shape)))
    return floats.get(largest.dtype, torch.float32)


class LazyTensor:
    """Stands for a tensor that is read when transformers asks for it."""

    def __init__(self, read: Callable[[], NDArray[Any]], dtype: str = "F32") -> None:
        self.read, self.dtype = read, dtype
        self.was_read = False

    def get_dtype(self) -> str:
        """Its type as safetensors spells it."""
        return self.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.was_read = True
        return to_torch(self.read())[index]


def sources_of(checkpoint: Checkpoint, reader: Reader) -> Iterator[tuple[str, Callable[..., NDArray[Any]]]]:
    """Tensors as an unquantized checkpoint would have them, and how to read each.

    What reads a tensor that is no part of a stack also takes the first and the last of its leading indices.
    """

    # gate and up of an expert are decoded together and asked for one after the other
    @lru_cache(maxsize=8)
    def expert(number: int, index: int) -> NDArray[Any]:
        return checkpoint.read(reader, checkpoint.weights[number], index, index + 1)[0]

    def decoded(number: int, piece: Piece, first: int = 0, stop: int | None = None) -> NDArray[Any]:
        if piece.expert is None:
            values = checkpoint.read(reader, checkpoint.weights[number], first, stop)
            # MXFP4 of gpt-oss lies as [E, N, K], its unquantized experts do not
            return np.swapaxes(values, 1, 2) if values.ndim == 3 and checkpoint.family.transposed else values
        return expert(number, piece.expert)[slice(*(piece.rows or (None,)))]

    for number, weight in enumerate(checkpoint.weights):
        for piece in weight.pieces:
            stored = checkpoint.tensors_of(weight) == list(weight.sources)
            yield piece.source, partial(reader.read, piece.source) if stored else partial(decoded, number, piece)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar for what takes a moment."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _short(error: Exception) -> str:
    """What an exception says in one line, with its type where it says little."""
    text = " ".join(str(error).split())
    text = text if len(text) < 300 else f"{text[:300]} ..."
    return (
        text if isinstance(error, (ValueError, RuntimeError, OSError)) and text else f"{type(error).__name__}: {text}"
    )


def _some(names: list[Any]) -> str:
    shown = ", ".join(str(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
