"""Words of findings."""

from halfbyte.audit.finding import Finding, count, ordered, some, verb


def test_the_gravest_comes_first() -> None:
    kinds = ("note", "poor", "missing", "wrong")
    assert [f.severity for f in ordered(Finding(kind, "code", "what") for kind in kinds)] == [*reversed(kinds)]


def test_a_note_is_no_problem() -> None:
    assert not Finding("note", "code", "what").is_problem and Finding("poor", "code", "what").is_problem


def test_names_are_shortened_and_numbers_get_their_noun() -> None:
    assert some("abcde") == "a, b, c and 2 more" and some("ab") == "a, b"
    assert (count(1, "matrix"), count(1200, "matrix"), count(2, "block")) == ("1 matrix", "1,200 matrices", "2 blocks")
    assert (count(2, "entry"), verb(1, "have"), verb(1, "match"), verb(2, "are")) == (
        "2 entries",
        "has",
        "matches",
        "are",
    )
