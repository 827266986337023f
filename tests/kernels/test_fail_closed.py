"""Compiled code stands in only for formats and searches that it knows whole; NumPy does all others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest

from halfbyte import kernels
from halfbyte.formats import BlockFormat, Codebook, ScaleType, codebooks, get_format, scales
from halfbyte.kernels import codec
from halfbyte.search import Search, encode, get_search
from halfbyte.search.gptq import gptq
from kernels.cases import NATIVE
from search.hessians import hessian

pytestmark = pytest.mark.skipif(not NATIVE, reason="no native kernels here")
X = np.random.RandomState(0).standard_normal((8, 128)).astype(np.float32)


@dataclass(frozen=True)
class Clipped(Search):
    """Every scale is that of absmax, times ``clip``."""

    clip: float = 0.9

    def candidates(self, amax: Any, codebook: Codebook, fmt: BlockFormat) -> Iterator[tuple[Any, Any]]:
        """The candidates of a block whose largest element is smaller by that factor."""
        return super().candidates(amax * np.float32(self.clip), codebook, fmt)


class Named(Search):
    """A subclass that adds nothing."""


class OwnFormat(BlockFormat):
    """A subclass whose scales decode to twice their value."""

    def split_scales(self, stored: Any) -> Any:
        """Twice what the scale type says."""
        values, chosen = super().split_scales(stored)
        return values * np.float32(2), chosen


class OwnScale(ScaleType):
    """A subclass that adds nothing."""


class OwnCodebook(Codebook):
    """A subclass whose elements are rounded to zero below one."""

    def encode(self, z: Any) -> Any:
        """Codes of the nearest values, small ones lost."""
        return super().encode(np.where(np.abs(z) < 1, np.float32(0), z))


def copy_as(kind: type, thing: Any, **changes: Any) -> Any:
    """The same object as one of a subclass."""
    return kind(**{f.name: getattr(thing, f.name) for f in fields(thing)} | changes)


def all_zero(codebook: Codebook, z: Any) -> Any:
    """The code of zero for every element."""
    return np.zeros(z.shape, dtype=np.uint8)


NVFP4 = get_format("nvfp4")
FORMATS = {
    "format": copy_as(OwnFormat, NVFP4),
    "scale type": replace(NVFP4, scale=copy_as(OwnScale, scales.E4M3)),
    "codebook": replace(NVFP4, codebooks=(copy_as(OwnCodebook, codebooks.E2M1),)),
    "rounding": replace(NVFP4, codebooks=(replace(codebooks.E2M1, rounding=all_zero),)),
    "scale of a known name": replace(NVFP4, scale=replace(scales.E4M3, to_value=lambda c: scales.E4M3.to_value(c) / 2)),
}


def same_everywhere(fmt: Any, search: Any) -> None:
    results = []
    for backend in (NATIVE[0], "reference"):
        with kernels.use_backend(backend):
            tensor = encode(X, fmt, search)
            results.append((tensor.codes.tobytes(), tensor.scales.tobytes(), tensor.decode().tobytes()))
    assert results[0] == results[1]


def test_a_field_that_kernels_do_not_know_counts_on_every_backend() -> None:
    clipped = Clipped("clip90", "absmax scales times 0.9")
    assert not kernels.supports(NVFP4, clipped) and kernels.supports(NVFP4, get_search("absmax"))
    same_everywhere(NVFP4, clipped)
    with kernels.use_backend(NATIVE[0]):
        assert encode(X, NVFP4, clipped).scales.tobytes() != encode(X, NVFP4, "absmax").scales.tobytes()


def test_the_candidates_of_a_search_count_in_gptq_too() -> None:
    clipped, h = Clipped("clip90", "absmax scales times 0.9"), hessian(128)
    results = []
    for backend in (NATIVE[0], "reference"):
        with kernels.use_backend(backend):
            results.append(gptq(X, NVFP4, clipped, h))
    assert results[0].codes.tobytes() == results[1].codes.tobytes()
    assert results[0].scales.tobytes() != gptq(X, NVFP4, "absmax", h).scales.tobytes()


def test_a_subclass_of_search_without_fields_of_its_own_runs_in_numpy() -> None:
    assert not kernels.supports(NVFP4, copy_as(Named, get_search("sweep")))


@pytest.mark.parametrize("what", FORMATS)
def test_formats_that_kernels_do_not_know_are_the_same_on_every_backend(what: str) -> None:
    assert not kernels.supports(FORMATS[what])
    same_everywhere(FORMATS[what], "sweep")


def test_a_known_class_with_a_new_field_is_no_longer_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.supports(NVFP4, get_search("sweep"))
    without_order = codec._FIELDS[BlockFormat] - {"order"}
    monkeypatch.setitem(codec._FIELDS, BlockFormat, without_order)
    assert not kernels.supports(NVFP4, get_search("sweep"))


def test_a_backend_is_chosen_for_one_thread_and_handed_to_pools() -> None:
    other = threading.Event(), threading.Event()
    seen: list[str] = []

    def elsewhere() -> None:
        other[0].wait(10)
        seen.append(kernels.backend())
        other[1].set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    before = kernels.backend()
    with kernels.use_backend("reference"):
        other[0].set()
        assert other[1].wait(10) and kernels.backend() == "reference"
        with ThreadPoolExecutor(1, "test", kernels.use_backend_here, (kernels.backend(),)) as pool:
            assert pool.submit(kernels.backend).result() == "reference"
    thread.join()
    assert seen == [before] and kernels.backend() == before
