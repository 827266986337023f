"""Which models GGUF files are written for: the tensors of each, and where llama.cpp looks for them.

The lists name what a checkpoint may hold; what llama.cpp calls it comes from gguf's own name map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from halfbyte.errors import PlanError

_ENDS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_ATTENTION = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
)
_ATTENTION_BIASES = tuple(f"self_attn.{p}_proj.bias" for p in "qkvo")
_QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class Place(NamedTuple):
    """A tensor of a GGUF file; ``part``: 0 for the gate rows of a weight, 1 for its up rows, None for all."""

    name: str
    part: int | None = None


@dataclass(frozen=True)
class Model:
    """An architecture: its name in GGUF, in config.json, and the tensors of a layer.

    ``permuted``: q and k rows lie in llama.cpp's order, in which the two halves of a head alternate.
    ``interleaved``: gate and up rows alternate in the source's stacks of experts. ``unscaled``: tensors
    whose global scale llama.cpp's graph does not apply.
    """

    name: str
    architectures: tuple[str, ...]
    layer: tuple[str, ...]
    permuted: bool = False
    interleaved: bool = False
    unscaled: tuple[str, ...] = ("token_embd",)

    @cached_property
    def _map(self) -> Any:
        gguf = library()
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        return gguf.get_tensor_name_map(arch, 1)

    @cached_property
    def _known(self) -> dict[str, tuple[Place, ...]]:
        """Places of the ends and of layer 0."""
        names = [*_ENDS, *(f"model.layers.0.{name}" for name in self.layer)]
        return {name: tuple(self._find(name)) for name in names}

    def _find(self, name: str) -> list[Place]:
        bias = name.endswith("_bias")
        stem = name.removesuffix("_bias").removesuffix(".gate_up_proj")
        ending = ".bias" if bias else ".weight"
        if ".experts.gate_up_proj" in name:
            return [Place(self._spell(f"{stem}.{part}_proj{ending}"), i) for i, part in enumerate(("gate", "up"))]
        if name.endswith((".down_proj_bias", ".experts.down_proj")):
            return [Place(self._spell(stem + ending))]
        return [Place(self._spell(f"{name}.weight" if name.endswith(".sinks") else name))]

    def _spell(self, name: str) -> str:
        name_there = self._map.get_name(name, (".weight", ".bias"))
        assert name_there is not None, name
        return str(name_there)

    def places(self, name: str) -> tuple[Place, ...]:
        """Where a weight lies; PlanError if there is no place for it."""
        words = name.split(".")
        layer = words[2] if name.startswith("model.layers.") and len(words) > 3 and words[2].isdecimal() else None
        if layer is not None:
            words[2] = "0"
        places = self._known.get(".".join(words))
        if places is None:
            raise PlanError(
                f"llama.cpp's {self.name} models have no tensor for {name}; drop it by a rule of the recipe, "
                "or choose another dialect"
            )
        if layer is None:
            return places
        return tuple(place._replace(name=place.name.replace("blk.0.", f"blk.{layer}.")) for place in places)

    def rows(self, place: Place, n: int) -> tuple[int, int, int] | None:
        """The rows (first, stop, step) of a weight with ``n`` rows that lie there, None for all."""
        if place.part is None:
            return None
        return (place.part, n, 2) if self.interleaved else (place.part * n // 2, (place.part + 1) * n // 2, 1)

    def weights(self, layers: int) -> list[str]:
        """Names of all weights that a checkpoint with so many layers may hold."""
        return [*_ENDS, *(f"model.layers.{i}.{name}" for i in range(layers) for name in self.layer)]


MODELS = (
    Model(
        "llama",
        ("LlamaForCausalLM", "MistralForCausalLM"),
        (
            *_ATTENTION,
            *_MLP,
            *_ATTENTION_BIASES,
            *(name.replace(".weight", ".bias") for name in _MLP),
        ),
        permuted=True,
    ),
    Model("qwen3", ("Qwen3ForCausalLM",), (*_ATTENTION, *_QK_NORMS, *_MLP)),
    Model("qwen3moe", ("Qwen3MoeForCausalLM",), (*_ATTENTION, *_QK_NORMS, "mlp.gate.weight", *_EXPERTS)),
    Model(
        "gpt-oss",
        ("GptOssForCausalLM",),
        (
            *_ATTENTION,
            *_ATTENTION_BIASES,
            "self_attn.sinks",
            "mlp.router.weight",
            "mlp.router.bias",
            *_EXPERTS,
            *(f"{name}_bias" for name in _EXPERTS),
        ),
        interleaved=True,
        unscaled=("token_embd", *(f"ffn_{part}_exps" for part in ("gate", "up", "down"))),
    ),
)


def model_of(config: Mapping[str, Any]) -> Model:
    """The model of a config.json; PlanError names those that there are."""
    architectures = config.get("architectures") or ["no architecture"]
    for model in MODELS:
        if any(name in model.architectures for name in architectures):
            return model
    known = ", ".join(name for model in MODELS for name in model.architectures)
    raise PlanError(f"the dialect gguf is written for {known}, and this checkpoint is {architectures[0]}")


def library() -> Any:
    """The library gguf; PlanError says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise PlanError(
            "the dialect gguf needs the library of that name; install it with: pip install 'halfbyte[gguf]'"
        ) from error
    return gguf
