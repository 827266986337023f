from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import Protocol, Window, windows


@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_every_token_is_scored_once_and_with_something_before_it(tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    cut = list(windows(tokens, length, stride))
    scored = [i for w in cut for i in range(w.scored, w.stop)]
    assert len(set(scored)) == len(scored) and sorted(scored) == scored
    assert all(w.start < w.scored < w.stop <= tokens and w.stop - w.start <= length for w in cut)
    if stride < length:
        assert scored == list(range(1, tokens))
        assert all(w.scored - w.start >= length - stride for w in cut[1:])
    else:
        # only the first token of each window has nothing before it
        assert scored == [i for i in range(tokens) if i % length]


def test_without_overlap_each_window_predicts_all_but_its_first_token() -> None:
    assert list(windows(8, 4, 4)) == [Window(0, 4, 1), Window(4, 8, 5)]


def test_with_overlap_a_window_scores_only_what_is_new() -> None:
    assert list(windows(9, 4, 2)) == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 8, 6), Window(6, 9, 8)]


def test_a_single_last_token_is_no_window_of_its_own() -> None:
    assert list(windows(5, 4, 4)) == [Window(0, 4, 1)]


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (8, 0), (8, 9)])
def test_windows_that_would_skip_tokens_or_predict_nothing_are_refused(length: int, stride: int) -> None:
    with pytest.raises(HalfbyteError):
        list(windows(10, length, stride))


def test_a_protocol_says_what_a_perplexity_depends_on() -> None:
    said = str(Protocol("wiki.txt", 512, 256, 7, 2000, "float32"))
    assert said == "wiki.txt: 2,000 tokens scored in 7 windows of 512, stride 256, no special tokens, float32"
