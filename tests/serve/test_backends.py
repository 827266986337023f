"""The order in which backends are tried."""

from __future__ import annotations

from halfbyte.serve.backends import Backend, Backends
from halfbyte.serve.decision import Precision


def test_backends_known_to_be_down_come_last() -> None:
    backends = Backends(
        [Backend(Precision(name, bits), "", "") for name, bits in (("a", 4.0), ("b", 8.0), ("c", 16.0))]
    )
    assert [b.name for b in backends.candidates("a", only=False)] == ["a", "b", "c"]
    backends["b"].healthy = False
    assert [b.name for b in backends.candidates("b", only=False)] == ["c", "a", "b"]
    assert [b.name for b in backends.candidates("b", only=True)] == ["b"]


def test_keys_of_backends_are_not_printed() -> None:
    assert "secret" not in repr(Backend(Precision("a", 4.0), "", "", api_key="secret"))
