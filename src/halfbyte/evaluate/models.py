"""Checkpoints as models to measure: loaded by halfbyte, or by transformers where halfbyte does not read the format."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from halfbyte.dialects import quantization_config_of
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.evaluate.finite import watch_logits
from halfbyte.evaluate.results import name_of
from halfbyte.runtime.loading import load
from halfbyte.source.checkpoint import Checkpoint


@contextlib.contextmanager
def opened(
    path: str | Path, dtype: str, dequantize: bool = False, device: Any = None, revision: str | None = None
) -> Iterator[Any]:
    """The model of a checkpoint, in eval mode, for as long as the block lasts; then its memory is free again."""
    model = open_model(path, dtype, dequantize, device, revision)
    try:
        yield model
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def open_model(
    path: str | Path, dtype: str, dequantize: bool = False, device: Any = None, revision: str | None = None
) -> Any:
    """``halfbyte.load``, or transformers' own loading of a quantization that only transformers reads.

    A forward pass of the model with logits that are not finite is a MeasurementError, whoever runs it.
    """
    model = _open_model(path, dtype, dequantize, device, revision)
    watch_logits(model, name_of(path))
    return model


def _open_model(path: str | Path, dtype: str, dequantize: bool, device: Any, revision: str | None) -> Any:
    checkpoint = Checkpoint.open(path, revision)
    if loaded_by(checkpoint) == "halfbyte":
        return load(path, dtype, dequantize, device, revision)
    method = quantization_config_of(checkpoint.inventory).get("quant_method")
    if str(method) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise CheckpointError(f"{path} is quantized by {method!r}, which neither halfbyte nor transformers can load")
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.inventory.root,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # each quantizer of transformers has errors of its own
        raise CheckpointError(f"neither halfbyte nor transformers can load {path} ({error})") from error
    missing = [name for key in ("missing_keys", "mismatched_keys") for name in report.get(key) or ()]
    if missing:
        # transformers would make random weights of them
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}")
    return (model.to(device) if device is not None else model).eval()


def loaded_by(checkpoint: Checkpoint) -> str:
    """``halfbyte``, or ``transformers`` for what is quantized in a way that halfbyte does not read."""
    foreign = checkpoint.dialect is None and quantization_config_of(checkpoint.inventory)
    return "transformers" if foreign else "halfbyte"


def vocabulary(model: Any) -> int:
    """How many tokens a model tells apart."""
    return int(model.config.get_text_config().vocab_size)


def check_length(model: Any, path: str | Path, length: int) -> None:
    """HalfbyteError if windows of ``length`` tokens have more positions than the model."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and length > positions:
        raise HalfbyteError(f"{path} has {positions} positions, so windows of {length} tokens are too long for it")
