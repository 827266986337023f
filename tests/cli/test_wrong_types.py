"""Wrong types in strangers' JSON end in one sentence, or do not matter: never in any other exception."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from halfbyte.errors import HalfbyteError
from wrong_sources import SOURCES, Source
from wrong_types import VALUES, changes, replaced

SAMPLE = 60
"""Changes of each source, spread evenly over all files, places and values; every kind of value among them."""


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=[name for name, *_ in SOURCES])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_wrong_type_anywhere_is_refused_in_a_sentence_or_does_not_matter(source: Source, tmp_path: Path) -> None:
    _, make, uses = source
    folder = make(tmp_path / "m")
    every = list(changes(folder))
    step = next(s for s in range(max(1, len(every) // SAMPLE), len(every) + 1) if math.gcd(s, len(VALUES)) == 1)
    for file, path, kind in every[::step]:
        before = file.read_bytes()
        file.write_text(json.dumps(replaced(json.loads(before), path, VALUES[kind])))
        for use in uses:
            began = time.process_time()
            try:
                use(folder)
            except HalfbyteError as error:
                assert "\n" not in str(error) and len(str(error)) < 1500, (file.name, path, kind)
            except Exception as error:
                pytest.fail(f"{use.__name__} with {kind} at {path} of {file.name}: {error!r}")
            assert time.process_time() - began < 5, (file.name, path, kind)
        file.write_bytes(before)
