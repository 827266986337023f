"""Weights that engines hold together share a format, and are requantized together."""

from __future__ import annotations

import pytest

from halfbyte.formats import get_format
from halfbyte.models import Weight
from halfbyte.plan.fusion_groups import check_groups, check_tied, requantized_together
from halfbyte.plan.shards import Item
from halfbyte.plan.transcoding import REQUANTIZED


def item(name: str, fmt: str | None, action: str = "quantize", group: str | None = None, role: str = "mlp.up") -> Item:
    weight = Weight(name, role, 0, (64, 64), "BF16", (), group=group)
    return Item(weight, action, "why", get_format(fmt) if fmt else None)


def test_members_of_a_group_need_one_format() -> None:
    gate, up = item("gate", "nvfp4", group="g"), item("up", "nvfp4", group="g")
    assert check_groups([gate, up, item("down", "mxfp4")]) is None
    refusal = check_groups([gate, item("up", "mxfp4", group="g")])
    assert refusal is not None
    assert refusal.reason == (
        "engines fuse the group g, so its members need one format, but they have gate: nvfp4, up: mxfp4"
    )
    refusal = check_groups([gate, item("up", None, "keep", "g")])
    assert refusal is not None and refusal.reason.endswith("gate: nvfp4, up: keep")


def test_weights_without_a_group_may_differ() -> None:
    assert check_groups([item("a", "nvfp4"), item("b", "mxfp4")]) is None


@pytest.mark.parametrize(
    ("fmt", "together"), [("nvfp4", True), ("fp8_tensor", True), ("mxfp4", False), ("fp8_channel", False)]
)
def test_a_group_that_shares_a_scale_is_requantized_as_a_whole(fmt: str, together: bool) -> None:
    items = [
        item("q", fmt, "transcode", "qkv"),
        item("k", fmt, "quantize", "qkv"),
        item("o", fmt, "transcode"),
        item("gate", fmt, "transcode", "g"),
    ]
    found = requantized_together(items)
    assert [i.action for i in found] == ["quantize" if together else "transcode", "quantize", "transcode", "transcode"]
    assert found[0].reason == (REQUANTIZED if together else "why") and found[1].reason == "why"


@pytest.mark.parametrize(
    ("tied", "lm_head", "action", "refused"),
    [
        (True, "nvfp4", "quantize", True),
        (True, None, "keep", False),
        (True, "nvfp4", "drop", False),
        (False, "nvfp4", "quantize", False),
    ],
)
def test_tied_embeddings_need_one_format(tied: bool, lm_head: str | None, action: str, refused: bool) -> None:
    items = [item("embed", None, "keep", role="embedding"), item("lm_head", lm_head, action, role="lm_head")]
    refusal = check_tied({"tie_word_embeddings": tied}, [*items, item("up", "nvfp4")])
    assert (refusal is not None) == refused
    if refusal is not None:
        assert refusal.reason.endswith("but they have embed: keep, lm_head: nvfp4")
