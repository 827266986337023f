from __future__ import annotations

from importlib import import_module

import pytest

from halfbyte.renamed import accepts_old_names


@accepts_old_names(workers="threads")
def work(path: str, threads: int | None = None) -> tuple[str, int | None]:
    return path, threads


def test_an_old_argument_is_read_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match=r"the argument 'workers' of work\(\) is now 'threads'"):
        assert work("out", workers=3) == ("out", 3)  # type: ignore[call-arg]


def test_both_names_of_an_argument_are_refused() -> None:
    with pytest.raises(TypeError, match=r"work\(\) got 'threads' and its old name 'workers'; give only 'threads'"):
        work("out", workers=3, threads=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("halfbyte.view", "halfbyte.source.checkpoint", ["Checkpoint"]),
        ("halfbyte.report.card", "halfbyte.report.model_card", ["Card", "model_card"]),
    ],
)
def test_an_old_module_holds_what_the_new_one_does(old: str, new: str, names: list[str]) -> None:
    assert import_module(old).__all__ == names
    assert all(getattr(import_module(old), name) is getattr(import_module(new), name) for name in names)
