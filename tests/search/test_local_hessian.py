from __future__ import annotations

import numpy as np
import pytest

from halfbyte.errors import FormatError
from halfbyte.formats import get_format
from halfbyte.search import encode, get_search
from halfbyte.search.gptq import gptq
from halfbyte.search.hessian import diagonal_blocks
from halfbyte.search.local_hessian import prepare_local
from halfbyte.search.reference import candidates
from search.hessians import encode_local, hessian, output_error, weight

FORMATS = ("nvfp4", "mixfp4", "if4", "mxfp4", "int4_g32", "int4_asym_g32", "affine4_g32")


def local_part(h: np.ndarray, size: int) -> np.ndarray:
    """The Hessian with everything outside the blocks along its diagonal set to zero."""
    mask = np.kron(np.eye(len(h) // size), np.ones((size, size)))
    return h * mask


def costs(w: np.ndarray, decoded: np.ndarray, h: np.ndarray, size: int) -> np.ndarray:
    """e H e of every block [N, K/B], in FP64."""
    e = (decoded.astype(np.float64) - w).reshape(len(w), -1, size)
    return np.einsum("nbi,bij,nbj->nb", e, diagonal_blocks(h, size), e)


@pytest.mark.parametrize("name", ["nvfp4", "mixfp4", "mxfp4", "iq4_nl"])
def test_each_block_gets_the_candidate_of_least_cost(name: str) -> None:
    """Against every candidate tried one by one, in FP64."""
    fmt, how = get_format(name), get_search("sweep")
    w, size = weight(12, 64), get_format(name).block[1]
    h = hessian(64) + 0.0
    found = encode_local(w, name, "sweep", h, damping=0.0)
    scale = 1.0 if found.global_scale is None else found.global_scale
    best = np.full((12, 64 // size), np.inf)
    y = (w / np.float32(scale)).reshape(-1, size)
    for index in fmt.order:
        codebook = fmt.codebooks[index]
        for _, value in candidates(np.abs(y).max(axis=1), codebook, fmt, how):
            q = codebook.array[codebook.encode(y / value[:, None])] * value[:, None] * scale
            best = np.minimum(best, costs(w, q.reshape(12, 64), h, size))
    assert np.allclose(costs(w, found.decode(), h, size), best, rtol=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_costs_fall_from_squared_error_to_local_hessian_to_feedback(name: str) -> None:
    w, h, size = weight(32, 256), hessian(256), get_format(name).block[1]
    local = local_part(h, size)
    plain = output_error(w, encode(w, name, "sweep").decode(), local)
    nearest = output_error(w, encode_local(w, name, "sweep", h).decode(), local)
    feedback = output_error(w, encode_local(w, name, "sweep", h, codes="feedback").decode(), local)
    assert feedback < nearest <= plain * 1.0001


def test_only_the_blocks_along_the_diagonal_count() -> None:
    w, h = weight(8, 128), hessian(128)
    a, b = (encode_local(w, "mixfp4", "sweep", each) for each in (h, local_part(h, 16)))
    assert a.codes.tobytes() == b.codes.tobytes() and a.scales.tobytes() == b.scales.tobytes()


def test_a_diagonal_hessian_is_importance() -> None:
    w, importance = weight(16, 128), np.random.RandomState(3).uniform(0.1, 10, 128)
    found = encode_local(w, "nvfp4", "sweep", np.diag(importance), damping=0.0)
    weighted = encode(w, "nvfp4", "sweep", importance)
    # equal losses may be rounded differently
    assert (found.scales == weighted.scales).mean() > 0.99


def test_codes_of_nearest_values_are_those_of_plain_rounding() -> None:
    w = weight(8, 64)
    found = encode_local(w, "nvfp4", "absmax", hessian(64))
    assert found.codes.tobytes() == encode(w, "nvfp4", "absmax").codes.tobytes()


def test_feedback_within_blocks_is_gptq_with_the_local_hessian() -> None:
    w, h = weight(8, 64), hessian(64)
    found = encode_local(w, "nvfp4", "sweep", h, codes="feedback", damping=0.0)
    whole = gptq(w, "nvfp4", "sweep", local_part(h, 16), damping=0.0)
    assert (found.decode() == whole.decode()).mean() > 0.99


def test_experts_have_hessians_of_their_own() -> None:
    w, h = weight(2, 4, 64), np.stack([hessian(64, seed=s) for s in range(2)])
    whole = encode_local(w, "mixfp4", "sweep", h)
    for e in range(2):
        assert whole.codes[e].tobytes() == encode_local(w[e], "mixfp4", "sweep", h[e]).codes.tobytes()


def test_a_prepared_hessian_serves_several_weights() -> None:
    prepared = prepare_local(hessian(64), "nvfp4")
    for seed in range(2):
        w = weight(4, 64, seed=seed)
        assert gptq(w, "nvfp4", "sweep", prepared).codes.tobytes() == (
            encode_local(w, "nvfp4", "sweep", hessian(64)).codes.tobytes()
        )


def test_bad_arguments_are_refused() -> None:
    w = weight(4, 64)
    with pytest.raises(FormatError, match="prepared for nvfp4 and 32 columns"):
        encode_local(w, "nvfp4", "sweep", np.eye(32))
    with pytest.raises(FormatError, match="GPTQ does not apply: hif4"):
        encode_local(w, "hif4", "sweep", np.eye(64))
    with pytest.raises(FormatError, match="K = 40 is not a multiple"):
        prepare_local(np.eye(40), "nvfp4")
