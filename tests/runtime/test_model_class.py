"""Only model classes of transformers for the checkpoint's own kind of config are ever loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import halfbyte
from halfbyte.errors import CheckpointError
from halfbyte.runtime.loading import class_of
from halfbyte.source.checkpoint import Checkpoint

DEMO = Path(halfbyte.__file__).parent / "demo_model"


def with_config(folder: Path, **changes: object) -> Path:
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "AutoModelForCausalLM",
        "AutoTokenizer",
        "pipeline",
        "PreTrainedModel",
        "LlamaForCausalLM",
        "Trainer",
        "os",
        "",
    ],
)
def test_another_thing_of_that_name_is_not_taken(name: object, tmp_path: Path) -> None:
    usual = class_of(Checkpoint.open(DEMO))[1]
    found = class_of(Checkpoint.open(with_config(tmp_path / "m", architectures=[name])))[1]
    assert found.__name__ != name and found.__name__.removesuffix("ForConditionalGeneration")[:6] == usual.__name__[:6]


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "wide"}, {"num_hidden_layers": -1}, {"text_config": {"hidden_size": []}}]
)
def test_what_transformers_raises_becomes_one_sentence(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        halfbyte.load(with_config(tmp_path / "m", **changes))
    assert len(str(caught.value)) < 900
