"""What each engine calls the modules of a weight, and which of its rows they have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]

_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
}


def modules(dialect: str, model: str, name: str, values: Array) -> Iterator[tuple[str, Array]]:
    """Names and values [N, K], or [E, N, K] where the engine stacks experts; ``values`` are those of the weight."""
    if dialect == "halfbyte":
        yield name, values
    elif dialect == "gpt-oss":
        yield name, values.swapaxes(1, 2)
    elif values.ndim == 2:
        module = name.removesuffix(".weight")
        if dialect == "gguf":
            layer = "blk.0." if "layers.0." in module else ""
            module = f"{layer}{_GGUF[module.removeprefix('model.layers.0.')]}.weight"
        yield module, values
    else:
        base, _, last = name.rpartition(".")
        for part, rows in _projections(model, last, values):
            if dialect == "gguf":
                yield f"blk.0.ffn_{part}_exps.weight", rows
            elif dialect == "mlx":
                stack = base if model.startswith("gpt-oss") else base.replace(".experts", ".switch_mlp")
                yield f"{stack}.{part}_proj", rows
            else:
                yield from ((f"{base}.{e}.{part}_proj", expert) for e, expert in enumerate(rows))


def _projections(model: str, last: str, values: Array) -> Iterator[tuple[str, Array]]:
    if last == "down_proj":
        yield "down", values
        return
    half = values.shape[1] // 2
    # gate and up rows alternate in gpt-oss, and lie one after the other in all others
    ranges = (slice(0, None, 2), slice(1, None, 2)) if model.startswith("gpt-oss") else (slice(half), slice(half, None))
    for part, rows in zip(("gate", "up"), ranges, strict=True):
        yield part, values[:, rows]
