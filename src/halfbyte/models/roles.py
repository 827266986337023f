"""The vocabulary of roles: dotted names, from the general to the particular."""

from __future__ import annotations

_ROLES = """
    embedding lm_head position norm bias sink buffer router shared_expert_gate indexer residual other
    attention.q attention.k attention.v attention.o attention.qkv attention.gate
    attention.q_a attention.q_b attention.kv_a attention.kv_b
    linear_attention.qkv linear_attention.z linear_attention.qkvz linear_attention.a linear_attention.b
    linear_attention.ba linear_attention.out linear_attention.conv linear_attention.state
    linear_attention.q linear_attention.k linear_attention.v linear_attention.gate linear_attention.low_rank
    cross_attention.q cross_attention.k cross_attention.v cross_attention.o cross_attention.qkv
    mamba.in mamba.out mamba.conv mamba.state mamba.dt
    mlp.gate mlp.up mlp.down mlp.gate_up
    experts.gate_up experts.gate experts.up experts.down
    experts_latent.in experts_latent.out
    shared_expert.gate shared_expert.up shared_expert.down shared_expert.gate_up
    per_layer.embedding per_layer.gate per_layer.projection
    mtp.fc vision.linear vision.norm vision.bias vision.other
    audio.linear audio.norm audio.bias audio.other
"""

ROLES = frozenset(_ROLES.split())
"""Every role of the main model; `mtp.<role>` and `quantized.<role>` wrap any of them."""

TOWERS = ("vision.", "audio.")
"""Role spaces of encoders beside the text model: only the kind of their tensors matters."""

WRAPPERS = ("quantized.", "mtp.")
"""`quantized.` marks tensors of an already quantized source, `mtp.` those that predict further tokens."""

LINEAR = (
    "attention",
    "cross_attention",
    *(f"linear_attention.{part}" for part in ("q", "k", "v", "qkv", "z", "qkvz", "gate", "out")),
    "mamba.in",
    "mamba.out",
    "mlp",
    "experts",
    "shared_expert",
)
"""What the alias `linear` of a recipe stands for: the large matrices of the main model."""

_MATRICES = (
    *LINEAR,
    *("linear_attention.a", "linear_attention.b", "linear_attention.ba", "linear_attention.low_rank"),
    *("embedding", "lm_head", "shared_expert_gate", "indexer", "experts_latent", "per_layer", "mtp.fc"),
    *("vision.linear", "audio.linear"),
)


def is_under(role: str, prefix: str) -> bool:
    """Whether `role` is or lies below `prefix`: `experts.down` is under `experts`, `mtp.experts.down` not."""
    return role == prefix or role.startswith(prefix + ".")


def is_matrix(role: str) -> bool:
    """Whether tensors of this role are matrices or stacks of them, which a quantized source may pack."""
    bare = bare_role(role)
    return any(is_under(bare, prefix) for prefix in _MATRICES)


def bare_role(role: str) -> str:
    """The role without `quantized.` and `mtp.`; `mtp.fc`, which exists only there, stays."""
    for wrapper in WRAPPERS:
        if role.startswith(wrapper) and role not in ROLES:
            role = role[len(wrapper) :]
    return role


def is_known(prefix: str) -> bool:
    """Whether some role is `prefix` or lies below it, also inside `mtp.` and `quantized.`."""
    if any(is_under(role, prefix) for role in ROLES) or prefix in {"mtp", "quantized"}:
        return True
    return any(prefix.startswith(wrapper) and is_known(prefix[len(wrapper) :]) for wrapper in WRAPPERS)
