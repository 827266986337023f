"""Which errors speak against a weight."""

from dataclasses import replace

from halfbyte.audit.compared_weight import ComparedWeight

BAD = ComparedWeight("w", "mlp.up", "nvfp4", 0.6, 0.009, 256, "w", 18.0)


def test_a_weight_far_from_the_source_is_another_unless_something_moved_it() -> None:
    assert BAD.is_another and not replace(BAD, moved=True).is_another
    assert replace(BAD, moved=True, relmse=20).is_another and replace(BAD, relmse=float("nan")).is_another


def test_a_weight_that_was_moved_is_judged_by_its_outputs() -> None:
    bad = replace(BAD, relmse=0.3)
    assert bad.is_worse and not replace(bad, worse_db=5.9).is_worse
    assert not replace(bad, moved=True, outputs=0.02).is_worse and not replace(bad, moved=True).is_worse
    assert replace(bad, moved=True, outputs=0.5).is_worse
