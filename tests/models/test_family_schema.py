from __future__ import annotations

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.models import family_schema as schema


@pytest.mark.parametrize("name", schema.names())
def test_a_packaged_family_is_named_as_its_file(name: str) -> None:
    assert schema.read(name).name == name


def test_own_entries_come_before_inherited_ones() -> None:
    child = schema.parse("name: x\nroles: {new.weight: norm, lm_head.weight: other}", "x")
    roles = list(child.extended(schema.read("base")).roles.items())
    assert roles[:2] == [("new.weight", "norm"), ("lm_head.weight", "other")]
    assert ("embed_tokens.weight", "embedding") in roles


def test_prefixes_are_replaced_not_joined() -> None:
    child = schema.parse("name: x\nprefixes: [backbone.]", "x")
    assert child.extended(schema.read("base")).prefixes == ("backbone.",)


def test_an_unknown_role_is_refused_by_name() -> None:
    with pytest.raises(HalfbyteError, match=r"odd\.yaml.*there is no role 'atention\.q'"):
        schema.parse("name: odd\nroles: {a.weight: atention.q}", "odd")


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(HalfbyteError, match="model_type"):
        schema.parse("name: odd\nmodel_type: [a]", "odd")


def test_what_a_family_says_about_its_norms_holds_for_those_that_extend_it() -> None:
    gemma = schema.read("gemma")
    child = schema.parse("name: x\nextends: gemma\nnorms: {a.weight: {feeds: [mlp.up]}}", "x").extended(gemma)
    assert child.zero_centred_norms == gemma.zero_centred_norms != ()
    assert set(child.norms) == {"a.weight", *gemma.norms}


def test_a_norm_cannot_feed_a_role_that_does_not_exist() -> None:
    with pytest.raises(HalfbyteError, match=r"there is no role 'mlp\.ups'"):
        schema.parse("name: x\nnorms: {a.weight: {feeds: [mlp.ups]}}", "x")
