"""How much a weight's error matters, from its place in the model alone."""

from __future__ import annotations

import pytest

from halfbyte.allocate.choices import Choice, make_units, predict
from halfbyte.allocate.prior import FEED_FORWARD, MIXERS, structure_factors
from halfbyte.demo import MODEL
from halfbyte.dialects import get_dialect
from halfbyte.models import Weight
from halfbyte.models.roles import ROLES, is_matrix, is_under
from halfbyte.source.checkpoint import Checkpoint

LAYERS = 4


def weight(role: str, layer: int | None = None, name: str = "") -> Weight:
    return Weight(name or f"{layer}.{role}", role, layer, (64, 64), "BF16", ())


def model(*extra: Weight) -> list[Weight]:
    """A head, embeddings, and four layers of attention and an MLP."""
    roles = ("attention.q", "attention.o", "mlp.gate_up", "mlp.down")
    blocks = [weight(role, layer) for layer in range(LAYERS) for role in roles]
    return [weight("embedding"), weight("lm_head"), *blocks, *extra]


def test_at_equal_errors_head_and_embeddings_get_the_bytes_before_the_experts_of_a_layer() -> None:
    demo = Checkpoint.open(MODEL)
    units = make_units(demo, get_dialect("halfbyte"), ("mxfp4", "keep"), ("linear", "embedding", "lm_head"))
    for unit in units:
        unit.choices = [Choice("keep", 2, 0.0), Choice("mxfp4", 1, 0.0125)]
    predict(units, factors=structure_factors(demo.weights))
    loss = {unit.weights[0].role: unit.choices[1].loss for unit in units if unit.weights[0].layer in (None, 0)}
    assert loss["lm_head"] > loss["embedding"] > max(v for k, v in loss.items() if is_under(k, "experts"))


def test_the_head_s_factor_is_one_and_the_others_fall_with_depth() -> None:
    factors = structure_factors(model())
    assert factors["None.lm_head"] == 1
    assert factors["None.embedding"] == pytest.approx(1 / 3)  # eight sublayers
    chain = ["None.embedding", *(f"{n}.{role}" for n in range(LAYERS) for role in ("attention.o", "mlp.down"))]
    assert [factors[name] for name in chain] == sorted((factors[name] for name in chain), reverse=True)
    assert factors["3.mlp.down"] == pytest.approx(1 / 9)  # the last one's share of the final stream


def test_tied_embeddings_count_at_both_ends() -> None:
    ends = model()
    assert structure_factors(ends, tied=True)["None.embedding"] == pytest.approx(1 + 1 / 3)
    assert structure_factors(ends, tied=True)["None.lm_head"] == pytest.approx(1 + 1 / 3)


def test_a_fused_weight_counts_as_what_it_consists_of() -> None:
    factors = structure_factors(model())
    assert factors["1.mlp.gate_up"] == pytest.approx(2 * factors["1.mlp.down"])


def test_routed_and_shared_experts_divide_their_sublayer() -> None:
    routed, shared = weight("experts.down", 0), weight("shared_expert.down", 0)
    alone = structure_factors([routed])[routed.name]
    both = structure_factors([routed, shared])
    assert both[routed.name] == both[shared.name] == alone / 2
    gated = structure_factors([routed, shared, weight("shared_expert_gate", 0)])
    assert gated[routed.name] == pytest.approx(4 * gated[shared.name])
    assert gated[routed.name] + gated[shared.name] == pytest.approx(alone)


def test_factors_are_the_same_whatever_the_order_of_weights() -> None:
    weights = model()
    assert structure_factors(weights) == structure_factors(weights[::-1])


@pytest.mark.parametrize("role", sorted(r for r in ROLES if is_matrix(r)))
@pytest.mark.parametrize("wrapper", ["", "mtp.", "quantized."])
def test_every_role_of_matrices_has_a_factor_between_the_last_sublayer_s_and_the_head_s(
    role: str, wrapper: str
) -> None:
    factors = structure_factors(model(weight(wrapper + role, 1, "it")))
    assert 1 / 9 / 5 <= factors["it"] <= 1
    inside = any(is_under(role, prefix) for prefix in (*MIXERS, *FEED_FORWARD))
    assert inside or role in {"embedding", "lm_head", "mtp.fc", "vision.linear", "audio.linear"}


def test_a_weight_of_unknown_place_counts_as_one_in_the_middle() -> None:
    factors = structure_factors(model(weight("other", None, "it")))
    assert factors["3.mlp.down"] < factors["it"] < factors["0.attention.o"]


def test_a_layer_of_one_sublayer_counts_as_one() -> None:
    factors = structure_factors([weight("mamba.in", 0), weight("mlp.down", 1), weight("attention.o", 2)])
    assert factors["2.attention.o"] == pytest.approx(1 / 4)
