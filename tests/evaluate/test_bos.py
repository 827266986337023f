"""The token that begins a text: put where the tokenizer puts it, said in the protocol, and part of every key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from halfbyte.calibrate.samples import make_samples
from halfbyte.cli import main
from halfbyte.demo import MODEL
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import TextSettings
from halfbyte.evaluate.bos import bos_token
from halfbyte.evaluate.evaluation import Settings, measure
from halfbyte.evaluate.forward import log_probabilities, reference_key
from halfbyte.evaluate.text import passage_of
from halfbyte.runtime.loading import load, load_tokenizer

BOS = 5


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, whose tokenizer puts its token 5 before every text."""
    folder = Path(shutil.copytree(MODEL, tmp_path_factory.mktemp("bos") / "model"))
    tokenizer = load_tokenizer(folder)
    token = tokenizer.convert_ids_to_tokens(BOS)
    tokenizer.bos_token = token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, BOS)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("wish", "expected"), [("auto", BOS), ("yes", BOS), ("no", None)])
def test_a_tokenizer_that_begins_texts_is_followed_unless_told_otherwise(
    with_bos: Path, wish: str, expected: int | None
) -> None:
    assert bos_token(load_tokenizer(with_bos), wish) == expected


def test_a_tokenizer_with_the_token_that_does_not_put_it_is_followed_too() -> None:
    tokenizer = load_tokenizer(MODEL)
    assert bos_token(tokenizer, "auto") is None
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(BOS)
    assert bos_token(tokenizer, "auto") is None and bos_token(tokenizer, "yes") == BOS


def test_a_wish_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(HalfbyteError, match="has no token that begins a text"):
        bos_token(load_tokenizer(MODEL), "yes")
    with pytest.raises(HalfbyteError, match="bos is 'maybe', but must be one of auto, yes, no"):
        bos_token(load_tokenizer(MODEL), "maybe")


def test_every_window_begins_with_it_and_the_same_tokens_are_scored(with_bos: Path) -> None:
    tokenizer = load_tokenizer(with_bos)
    first, plain = (
        passage_of(TextSettings(length=32, stride=16, max_tokens=100, bos=bos), with_bos, tokenizer)
        for bos in ("auto", "no")
    )
    assert first.windows == plain.windows and first.tokens == plain.tokens
    for window in first.windows:
        assert first.inputs(window) == [BOS, *plain.inputs(window)[1:]]
    model = load(with_bos, "float32")
    _, scored, targets = next(log_probabilities(model, first))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([first.inputs(first.windows[0])])).logits[0, :-1]
    torch.testing.assert_close(scored, torch.log_softmax(logits, -1), rtol=1e-4, atol=1e-4)
    assert targets.tolist() == plain.tokens[1:32]


def test_the_protocol_names_it_and_references_are_kept_apart(with_bos: Path) -> None:
    tokenizer = load_tokenizer(with_bos)
    keys = []
    for bos, words in (("auto", "stride 32, BOS first in each, float32"), ("no", "no special tokens, float32")):
        passage = passage_of(TextSettings(length=32, max_tokens=100, bos=bos), with_bos, tokenizer)
        assert words in str(passage.protocol) and passage.protocol.as_dict()["bos"] is (bos == "auto")
        keys.append(reference_key("m", passage, "float32", None, False))
    assert keys[0] != keys[1]


def test_calibration_samples_begin_with_it(with_bos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some words to calibrate on, again and again. " * 30)
    tokenizer = load_tokenizer(with_bos)
    first, plain = (make_samples([tmp_path / "t.txt"], tokenizer, 3, 16, bos) for bos in ("auto", "no"))
    assert first.bos and not plain.bos and first.fingerprint != plain.fingerprint
    assert [s[0] for s in first.tokens] == [BOS] * 3 and [s[1:] for s in first.tokens] == [s[1:] for s in plain.tokens]


@pytest.mark.slow
def test_calibrate_notes_it_and_announces_what_was_done_before(
    with_bos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(with_bos / "heldout.txt")
    command = ["calibrate", str(with_bos), str(tmp_path / "s"), "--text", text, "--samples", "2", "--length", "32"]
    assert main([*command, "--no-hessians", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bos"] is True
    assert main([*command, "--no-hessians"]) == 0
    assert "is complete already: 5 of 5 layers were calibrated before" in capsys.readouterr().err
    assert main([*command, "--no-hessians", "--bos", "no"]) == 2
    assert "holds something other than this calibration" in capsys.readouterr().err


def test_a_cached_source_is_announced(tmp_path: Path) -> None:
    settings = Settings(length=32, max_tokens=128, cache=tmp_path / "cache")
    lines: list[str] = []
    for _ in range(2):
        measure([], MODEL, settings, announce=lines.append)
    assert len(lines) == 1 and f"was measured before: its log-probabilities are in {tmp_path}/cache" in lines[0]
