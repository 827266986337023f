from __future__ import annotations

import numpy as np
import pytest

from halfbyte.errors import FormatError
from halfbyte.formats import get_format, list_formats
from halfbyte.formats.codebooks import E4M3 as E4M3_ELEMENTS
from halfbyte.search import SEARCHES, Search, encode, get_search, register_search


def test_sweep_and_absmax_apply_to_every_format() -> None:
    for name in list_formats():
        assert get_search("sweep", get_format(name)).name == "sweep"
        assert get_search("absmax", get_format(name)).name == "absmax"


def test_an_unknown_search_names_the_nearest() -> None:
    with pytest.raises(FormatError, match="unknown search 'four_over_sx': did you mean four_over_six"):
        get_search("four_over_sx")
    with pytest.raises(FormatError, match=r"known searches: absmax, .*sweep"):
        get_search("qqq")


@pytest.mark.parametrize(
    "name", ["nvint4", "mxfp4", "int4_g32", "hif4", "affine4_g64", "razer", "fp8_channel", "nvfp4_unscaled"]
)
def test_four_over_six_needs_e2m1_with_e4m3_scales(name: str) -> None:
    problem = f"needs E2M1 elements, E4M3 scales and a global scale, which {name} does not have"
    with pytest.raises(FormatError, match=problem):
        get_search("four_over_six", get_format(name))


@pytest.mark.parametrize(
    ("search", "chooses", "stands"),
    [
        ("sweep", "nvfp4 mxfp4 int4_g32 affine4_g64 hif4 fp8_channel fp8_block128 mixfp4", "fp8_tensor"),
        ("absmax", "mixfp4 if4 razer", "nvfp4 mxfp4 int4_g32 affine4_g64 hif4 fp8_channel fp8_tensor"),
        ("four_over_six", "nvfp4", ""),
    ],
)
def test_errors_decide_only_where_there_is_a_choice(search: str, chooses: str, stands: str) -> None:
    found = {name: get_search(search).chooses(get_format(name)) for name in f"{chooses} {stands}".split()}
    assert found == dict.fromkeys(chooses.split(), True) | dict.fromkeys(stands.split(), False)


@pytest.mark.parametrize("search", ["mx_even", "mx_rceil"])
def test_power_of_two_rules_need_power_of_two_scales(search: str) -> None:
    with pytest.raises(FormatError, match="does not apply to nvfp4; use absmax or sweep"):
        get_search(search, get_format("nvfp4"))
    found = [n for n in list_formats() if SEARCHES[search].problem(get_format(n)) is None]
    assert found == ["mxfp4", "mxfp8", "mxfp4_hadamard", "mxfp4_duquant"]


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_the_absmax_scale_is_the_first_candidate(search: object) -> None:
    for steps in ("offsets", "power_offsets"):
        assert getattr(search, steps)[0] == 0
    for ratios in ("int_ratios", "float_ratios", "shrink"):
        assert getattr(search, ratios)[0] == 1


def test_scales_of_8_bit_floats_are_tried_where_the_largest_element_becomes_a_value_of_e4m3() -> None:
    values = E4M3_ELEMENTS.array[np.isfinite(E4M3_ELEMENTS.array)]
    tops = 448 / np.array(SEARCHES["sweep"].float_ratios)
    assert tops.tolist() == sorted(values[(values >= 240) & (values <= 448)].tolist(), reverse=True)


def test_the_sweep_covers_three_codes_down_and_eight_up() -> None:
    assert sorted(SEARCHES["sweep"].offsets) == list(range(-3, 9))


def test_the_sweep_contains_the_four_of_four_over_six_for_every_scale() -> None:
    import numpy as np

    from halfbyte.formats.scales import E4M3

    base = np.arange(1, 127).astype(np.uint8)
    four = E4M3.to_code(E4M3.to_value(base) * np.float32(1.5)).astype(int)
    assert set((four - base).tolist()) <= set(SEARCHES["sweep"].offsets)


def test_a_registered_search_is_found_by_its_name_and_a_taken_name_is_refused() -> None:
    narrow = Search("narrow", "absmax and its two neighbours", offsets=(0, 1, -1))
    try:
        assert register_search(narrow) is narrow and get_search("narrow") is narrow
        with pytest.raises(FormatError, match="there is a search 'narrow' already"):
            register_search(narrow)
        x = np.random.RandomState(0).standard_normal((4, 64)).astype(np.float32)
        assert encode(x, "nvfp4", "narrow").scales.tobytes() == encode(x, "nvfp4", narrow).scales.tobytes()
    finally:
        del SEARCHES["narrow"]


def test_powers_of_two_are_chosen_by_their_own_steps() -> None:
    codes, powers = Search("c", "", offsets=(0, 1)), Search("p", "", power_offsets=(0, 1))
    found = {name: (codes.chooses(get_format(name)), powers.chooses(get_format(name))) for name in ("nvfp4", "mxfp4")}
    assert found == {"nvfp4": (True, False), "mxfp4": (False, True)}
