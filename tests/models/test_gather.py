from __future__ import annotations

import pytest

from halfbyte.errors import CheckpointError
from halfbyte.models.gather import Gather
from halfbyte.models.weight import Piece

from .helpers import Tensor


def gate_up(count: int) -> Gather:
    gather = Gather("l.experts.gate_up_proj", "experts.gate_up", 3, ("gate", "up"), ("l.{expert}.g", "l.{expert}.u"))
    for expert in range(count):
        gather.sources[expert, 0] = Tensor(f"l.{expert}.g", "BF16", (4, 8))
        gather.sources[expert, 1] = Tensor(f"l.{expert}.u", "BF16", (4, 8))
    return gather


def test_experts_are_stacked_with_gate_rows_before_up_rows() -> None:
    weight = gate_up(2).weight(None)
    assert weight.shape == (2, 8, 8)
    assert weight.row_parts == (("gate", 0, 4), ("up", 4, 8))
    assert weight.pieces == (
        Piece("l.0.g", 0, (0, 4)),
        Piece("l.0.u", 0, (4, 8)),
        Piece("l.1.g", 1, (0, 4)),
        Piece("l.1.u", 1, (4, 8)),
    )


def test_the_order_of_the_sources_does_not_matter() -> None:
    gather, turned = gate_up(3), gate_up(0)
    turned.sources = dict(reversed(gather.sources.items()))
    assert turned.weight(None) == gather.weight(None)


def test_an_expert_of_one_part_fills_all_its_rows() -> None:
    gather = Gather("l.down", "experts.down", 0, ("down",), ("l.{expert}.d",))
    gather.sources = {(e, 0): Tensor(f"l.{e}.d", "BF16", (8, 4)) for e in range(2)}
    weight = gather.weight(2)
    assert weight.pieces == (Piece("l.0.d", 0, None), Piece("l.1.d", 1, None)) and weight.row_parts == ()


def test_a_missing_partner_is_named() -> None:
    gather = gate_up(3)
    del gather.sources[1, 1]
    with pytest.raises(CheckpointError, match=r"missing are l\.1\.u; download"):
        gather.weight(None)


def test_a_missing_first_expert_is_named() -> None:
    gather = gate_up(2)
    del gather.sources[0, 0]
    with pytest.raises(CheckpointError, match=r"l\.0\.g"):
        gather.weight(None)


def test_missing_last_experts_are_found_by_the_config() -> None:
    with pytest.raises(CheckpointError, match=r"l\.2\.g, l\.2\.u, l\.3\.g, l\.3\.u and 4 more"):
        gate_up(2).weight(6)


def test_more_experts_than_the_config_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"l\.2\.g: the config names only 2 experts"):
        gate_up(3).weight(2)


@pytest.mark.parametrize("odd", [Tensor("odd", "F32", (4, 8)), Tensor("odd", "BF16", (4, 16))])
def test_experts_of_another_dtype_or_shape_are_refused_by_name(odd: Tensor) -> None:
    gather = gate_up(2)
    gather.sources[1, 0] = odd
    with pytest.raises(CheckpointError, match=r"cannot be stacked: l\.0\.g has .* but not odd"):
        gather.weight(None)


def test_a_huge_number_in_a_name_costs_no_more_than_a_small_one() -> None:
    gather = gate_up(1)
    gather.sources[10**17, 0] = Tensor("l.big.g", "BF16", (4, 8))
    with pytest.raises(
        CheckpointError, match=r"missing are l\.1\.g, l\.1\.u, l\.2\.g, l\.2\.u and 199999999999999995 more"
    ):
        gather.weight(None)
    with pytest.raises(CheckpointError, match=r"and \d+ more; download"):
        gate_up(1).weight(10**12)
