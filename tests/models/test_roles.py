from __future__ import annotations

import pytest

from halfbyte.models.roles import LINEAR, ROLES, bare_role, is_known, is_matrix, is_under


def test_a_role_is_under_itself_and_its_prefixes_only() -> None:
    assert is_under("experts.gate_up", "experts") and is_under("experts", "experts")
    assert not is_under("experts_latent.in", "experts")


def test_mtp_is_not_under_the_main_models_role() -> None:
    assert not is_under("mtp.experts.down", "experts")


@pytest.mark.parametrize(
    ("role", "bare"),
    [("quantized.mtp.experts.down", "experts.down"), ("mtp.fc", "mtp.fc"), ("quantized.mtp.fc", "mtp.fc")],
)
def test_bare_role_removes_wrappers_but_keeps_mtp_fc(role: str, bare: str) -> None:
    assert bare_role(role) == bare


@pytest.mark.parametrize("prefix", ["experts", "mtp", "mtp.experts", "quantized.mtp.mlp.gate", "vision.linear"])
def test_roles_prefixes_and_wrapped_roles_are_known(prefix: str) -> None:
    assert is_known(prefix)


@pytest.mark.parametrize("prefix", ["expert", "experts.gat", "mtp.expert", ""])
def test_other_words_are_not_known(prefix: str) -> None:
    assert not is_known(prefix)


def test_every_linear_role_is_a_matrix() -> None:
    roles = [role for role in ROLES if any(is_under(role, prefix) for prefix in LINEAR)]
    assert roles and all(is_matrix(role) for role in roles)


@pytest.mark.parametrize("role", ["router", "norm", "bias", "linear_attention.conv", "linear_attention.state"])
def test_small_tensors_are_not_matrices(role: str) -> None:
    assert not is_matrix(role)
