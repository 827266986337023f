"""halfbyte.json holds the hash of itself, and only keys that this release knows."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from halfbyte.errors import VerifyError
from halfbyte.plan.sealed_provenance import UNKNOWN, Outcome, calibrated_errors, check_keys, is_sealed, seal, spell

ORIGIN: dict[str, Any] = {"halfbyte": 3, "source": {"name": "m"}, "dialect": "halfbyte", "recipe": {}}
SIZES = {"b": 2, "a": 1}
SEALED = spell(ORIGIN, "f" * 64, SIZES, [], Outcome({"a": "1" * 64}, "s" * 64))


def test_the_last_entry_is_the_hash_of_the_file_with_zeros_in_its_place() -> None:
    content = json.loads(SEALED)
    assert list(content)[-1] == "sha256"
    assert content["sha256"] == hashlib.sha256(SEALED.replace(content["sha256"].encode(), b"0" * 64)).hexdigest()


def test_it_names_the_source_the_plan_and_every_file() -> None:
    content = json.loads(SEALED)
    assert content["source"] == {"name": "m", "sample": "s" * 64} and content["plan"] == "f" * 64
    assert content["files"] == {"a": {"bytes": 1, "sha256": "1" * 64}, "b": {"bytes": 2, "sha256": UNKNOWN}}
    assert list(content["files"]) == ["a", "b"]


def test_its_size_does_not_depend_on_the_hashes() -> None:
    unknown = spell(ORIGIN, "f" * 64, SIZES, [], Outcome())
    assert len(unknown) == len(SEALED) and unknown != SEALED


def test_errors_weighted_by_activations_are_read_as_they_were_written_in_a_fixed_length() -> None:
    errors = {"w": (1.25, 3e-7), "v": (1e120, 1e-120)}
    known = spell(ORIGIN, "f" * 64, SIZES, ["w", "v", "u"], Outcome(errors=errors))
    assert calibrated_errors(json.loads(known)) == {"w": (1.25, 3e-7), "v": (9e99, 0), "u": (0, 0)}
    assert len(known) == len(spell(ORIGIN, "f" * 64, SIZES, ["w", "v", "u"], Outcome()))
    assert calibrated_errors(json.loads(SEALED)) == {}


def test_every_changed_byte_breaks_the_seal() -> None:
    assert is_sealed(SEALED)
    for at in range(len(SEALED)):
        damaged = bytearray(SEALED)
        damaged[at] ^= 1
        assert not is_sealed(bytes(damaged)), at
    assert not any(map(is_sealed, (b"", b"[]", SEALED[:-1], SEALED + b"\n", b"[" * 100_000)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"importance": {}, "folds": None, "rounded_with_hessian": {}}, None),
        ({"impotance": {}}, "the unknown key 'impotance'"),
        ({"halfbyte": 4}, "a version that this release does not know"),
        ({"halfbyte": 0}, "a version that this release does not know"),
        ({"halfbyte": "3"}, "a version that this release does not know"),
        ({"plan": None}, "no key 'plan'"),
    ],
)
def test_keys_are_those_that_the_release_writes(change: dict[str, Any], problem: str | None) -> None:
    content = {k: v for k, v in (json.loads(SEALED) | change).items() if v is not None or k == "folds"}
    if problem is None:
        check_keys(content, "halfbyte.json")
        return
    with pytest.raises(VerifyError, match=f"halfbyte.json has {problem}, so it is damaged or of a newer release"):
        check_keys(content, "halfbyte.json")


@pytest.mark.parametrize("version", [1, 2])
def test_releases_without_hashes_lack_their_keys(version: int) -> None:
    check_keys({**ORIGIN, "halfbyte": version}, "halfbyte.json")
    for key in ("plan", "files", "sha256"):
        with pytest.raises(VerifyError, match=f"the unknown key '{key}'"):
            check_keys({**ORIGIN, "halfbyte": version, key: ""}, "halfbyte.json")


def test_what_was_sealed_stays_sealed_whatever_it_holds() -> None:
    assert is_sealed(seal({"ä": [1.5, None, "\n"]}))
