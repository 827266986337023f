"""What is read of a checkpoint before it is served."""

from __future__ import annotations

from pathlib import Path

import pytest

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.serve.served_models import memory_note, read_model, read_models

DEMO = Path(halfbyte.__file__).parent / "demo_model"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "nvfp4"
    halfbyte.quantize(DEMO, out, "nvfp4", dialect="halfbyte")
    return out


def test_a_model_is_called_by_the_format_of_most_weights(packed: Path) -> None:
    four, sixteen = read_models([str(packed), str(DEMO)])
    assert (four.precision.name, four.dialect, sixteen.precision.name, sixteen.dialect) == (
        "nvfp4",
        "halfbyte",
        "bf16",
        None,
    )
    assert 4 <= four.precision.bits < 5 and 16 <= sixteen.precision.bits < 17
    assert four.nbytes < sixteen.nbytes == sixteen.dense_nbytes == four.dense_nbytes


def test_a_model_can_be_given_a_name() -> None:
    assert read_model(f"exact={DEMO}").precision.name == "exact"


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(HalfbyteError, match="2 models have the precision bf16; name them, such as other="):
        read_models([str(DEMO), str(DEMO)])


def test_what_several_precisions_cost_is_said() -> None:
    note = memory_note(read_models([f"a={DEMO}", f"b={DEMO}"]))
    assert note.startswith("weights of 2 models: 0.01 GB, of which the largest has 0.01 GB; they share nothing")
