"""Model cards: what they say comes from the checkpoint, its results and the source's card, and from nowhere else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from tests.report import documents
from tests.report.documents import NASTY, write

import halfbyte
from halfbyte.cli import main
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.fingerprint import content_hash
from halfbyte.evaluate.results import describe
from halfbyte.report.model_card import model_card
from halfbyte.report.read import ReportError
from halfbyte.source import running
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.overview import overview

DEMO = Path(halfbyte.__file__).parent / "demo_model"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model in NVFP4, by dialect."""
    folder = tmp_path_factory.mktemp("card")
    for dialect in ("halfbyte", "compressed-tensors", "mlx"):
        halfbyte.quantize(halfbyte.plan(DEMO, "mxfp4", dialect=dialect), folder / dialect)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def out(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made["halfbyte"], tmp_path / "demo-mxfp4"))


def results_of(folder: Path, path: Path, **more: Any) -> Path:
    """A results file with a row of this checkpoint: its own contents, numbers that a test knows."""
    checkpoint = Checkpoint.open(folder)
    row = documents.row("it", 1, 0.0123) | describe(folder, checkpoint) | {"fingerprint": content_hash(checkpoint)}
    return write(path, documents.results(documents.row("base", 16_000, None), row | more))


def front_matter(text: str) -> dict[str, Any]:
    return ModelCard(text).data.to_dict()


def test_numbers_are_those_of_the_results(out: Path, tmp_path: Path) -> None:
    text = model_card(out, [results_of(out, tmp_path / "r.json")]).text
    size = Checkpoint.open(out).inventory.total_bytes
    for number in ("0.01230", "0.01107 – 0.01353", "95.00%", "1.01000", f"{size:,} bytes", "4,080 tokens"):
        assert number in text, number


def test_every_decimal_number_can_be_traced(out: Path, tmp_path: Path) -> None:
    """Numbers with a point are in the results (rounded), in versions, or follow from the checkpoint's size."""
    path = results_of(out, tmp_path / "r.json")
    evaluation = model_card(out, [path]).text.split("## Evaluation")[1].split("## Use")[0]
    known = {value for entry in _numbers(yaml.safe_load(path.read_text())) for value in _spellings(entry)}
    shown = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", evaluation.replace("0.1.0", ""))
    assert shown and not [number for number in shown if number not in known]


def test_divergences_and_tasks_may_come_from_two_files(out: Path, tmp_path: Path) -> None:
    first = results_of(out, tmp_path / "kl.json")
    second = write(tmp_path / "tasks.json", documents.only_tasks(yaml.safe_load(first.read_text()), 0.4321))
    text = model_card(out, [first, second]).text
    assert "| MMLU-Pro, acc | 43.21% |" in text and "0.01230" in text


def test_results_of_another_checkpoint_are_refused(out: Path, tmp_path: Path) -> None:
    path = results_of(out, tmp_path / "r.json")
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ReportError, match="has no row for"):
        model_card(out, [path])


def test_a_licence_is_never_invented(out: Path, tmp_path: Path) -> None:
    card = model_card(out, [results_of(out, tmp_path / "r.json")])
    assert "license" not in front_matter(card.text)
    assert [line.split(":")[0] for line in card.missing] == ["base_model", "license"]


def test_licence_and_language_are_those_of_the_sources_card(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    said = {"license": "other", "license_name": "own", "license_link": "LICENSE", "language": ["en", "de"]}
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(said)}private: x\n---\ntext")
    path = results_of(out, tmp_path / "r.json")
    data = front_matter(model_card(out, [path], source=str(source), base_model="owner/base").text)
    assert said.items() <= data.items() and "private" not in data
    assert (data["base_model"], data["base_model_relation"]) == ("owner/base", "quantized")


def test_the_card_that_came_along_is_asked_too_and_writing_twice_changes_nothing(out: Path, tmp_path: Path) -> None:
    (out / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe source's card.")
    argv = ["card", str(out), "--results", str(results_of(out, tmp_path / "r.json"))]
    assert main(argv) == 0
    first = (out / "README.md").read_text()
    assert main(argv) == 0
    assert (out / "README.md").read_text() == first and front_matter(first)["license"] == "apache-2.0"


def test_a_base_model_is_known_where_the_source_came_from_the_hub(out: Path, tmp_path: Path) -> None:
    path = results_of(out, tmp_path / "r.json")
    document = yaml.safe_load(path.read_text())
    document["rows"][0] |= {"path": "owner/base", "revision": "0" * 40}
    assert front_matter(model_card(out, [write(path, document)]).text)["base_model"] == "owner/base"


def test_a_base_model_that_is_no_hub_id_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no hub id"):
        model_card(out, [results_of(out, tmp_path / "r.json")], base_model="./folder")


def test_damaged_front_matter_is_refused(out: Path, tmp_path: Path) -> None:
    (out / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ReportError, match="front matter"):
        model_card(out, [results_of(out, tmp_path / "r.json")])


def test_verify_accepts_the_card_in_place_of_the_sources(out: Path, tmp_path: Path) -> None:
    assert main(["card", str(out), "--results", str(results_of(out, tmp_path / "r.json"))]) == 0
    assert halfbyte.verify(out, DEMO).ok
    (out / "README.md").write_text("something else")
    assert not halfbyte.verify(out, DEMO).ok


def test_text_of_results_stays_text(out: Path, tmp_path: Path) -> None:
    path = results_of(out, tmp_path / "r.json")
    document = yaml.safe_load(path.read_text())
    document["command"] = f"x` {NASTY}"
    document["rows"][1]["protocol"]["note"] = document["rows"][1]["kl_protocol"]["note"] = NASTY
    text = model_card(out, [write(path, document)]).text
    outside = re.sub(r"`[^`\n]*`", "", text)
    assert "<img" not in outside.replace("\\<img", "")


@pytest.mark.parametrize(
    ("dialect", "snippet", "library"),
    [
        ("halfbyte", "import halfbyte.transformers", "halfbyte"),
        ("compressed-tensors", "vllm serve", "transformers"),
        ("mlx", "mlx_lm.server --model", "mlx"),
    ],
)
def test_each_dialect_says_how_it_is_run(
    made: dict[str, Path], tmp_path: Path, dialect: str, snippet: str, library: str
) -> None:
    text = model_card(made[dialect], [results_of(made[dialect], tmp_path / "r.json")], place="me/it").text
    use = text.split("## Use")[1]
    assert snippet in use and "me/it" in use
    assert front_matter(text)["library_name"] == library


def test_a_gguf_file_is_named_where_llama_cpp_runs_it(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = shared / "data/models/qwen3-tiny-wiki"
    halfbyte.quantize(halfbyte.plan(model, "mxfp4", dialect="gguf"), tmp_path / "out")
    found = overview(Checkpoint.open(tmp_path / "out"))
    (engine, _, command), *others = running.usage(found, "me/it")
    assert (engine, command) == ("llama.cpp", "llama-server -m me/it/qwen3-tiny-wiki-mxfp4.gguf") and not others
    assert running.library_of(found) == "gguf"


def test_an_engine_that_computes_wrong_numbers_is_not_recommended(tmp_path: Path) -> None:
    halfbyte.quantize(halfbyte.plan(DEMO, "nvfp4-fp8", dialect="compressed-tensors"), tmp_path / "out")
    found = overview(Checkpoint.open(tmp_path / "out"))
    assert not running.runs(found, "transformers") and running.library_of(found) == "vllm"
    assert any("computes wrong numbers" in line for line in running.cautions(found))


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in _numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _spellings(number: float) -> list[str]:
    return [f"{scale * number:.{digits}f}" for scale in (1, 100) for digits in range(2, 8)]


def test_a_checkpoint_that_could_not_be_measured_is_shown_as_not_valid(out: Path, tmp_path: Path) -> None:
    why = {"invalid": "it gives values that are not finite, first in model.layers.1", "kl": documents.divergence(0.0)}
    text = model_card(out, [results_of(out, tmp_path / "r.json", **why)]).text
    assert "**Not valid**: it gives values that are not finite, first in model.layers.1" in text
    assert "KL divergence from the source" not in text and "100" not in text.partition("## Evaluation")[2][:300]
    # files of earlier releases have a null where a number was not finite
    old = model_card(out, [results_of(out, tmp_path / "old.json", perplexity=None, kl=documents.divergence(0.0))]).text
    assert "**Not valid**" in old and "same most likely token" not in old


STRANGE = "mlp<img src=x onerror=alert(1)>\n# Heading\n[x](https://example.org) www.example.org @someone ~~gone~~"


@pytest.mark.parametrize("key", ["role", "task", "metric", "note", "machine", "version", "how", "created", "invalid"])
def test_nothing_of_a_results_file_is_markup(key: str, out: Path, tmp_path: Path) -> None:
    document = read_json(results_of(out, tmp_path / "r.json"))
    row = document["rows"][1]
    if key == "role":
        row["contains"][0]["roles"] = [STRANGE]
    elif key in ("task", "metric"):
        task = documents.task(0.5) | {"metric": STRANGE if key == "metric" else "acc", "protocol": STRANGE}
        row["tasks"] = {f"# {STRANGE}" if key == "task" else "t": task}
        pair = {"task": next(iter(row["tasks"])), "a": "base", "b": row["name"], "only_a": 1, "only_b": 2, "p": 0.5}
        document["comparisons"] = [pair | {"significant": False}]
    elif key == "note":
        row["protocol"]["note"] = row["kl_protocol"]["note"] = STRANGE
    elif key == "how":
        document["noise_floor"] = {"how": STRANGE, "kl": documents.divergence(0.1)}
    elif key == "invalid":
        row["invalid"] = STRANGE
    else:
        place = document if key == "created" else document["environment"]
        place |= {"versions": {STRANGE: STRANGE}} if key == "version" else {key: STRANGE}
    text = model_card(out, [write(tmp_path / "strange.json", document)]).text
    assert "\\<img" in text
    markup = r"(?<!\\)<img|^\s*(- )?# Heading|\]\(https:/|://|www\.\S|@\S|(?<!\\)~"
    assert not re.search(markup, body_of(text), re.MULTILINE)


def read_json(path: Path) -> Any:
    import json

    return json.loads(path.read_text())


def body_of(text: str) -> str:
    """The card's own links are to its base model and those of facts about engines, which no results file holds."""
    return text.split("---", 2)[2].partition("## Use")[0] + text.partition("## Provenance")[2]


@pytest.mark.parametrize("start", ["# a", "- a", "1. a", "+ a", "=== a", "> a", "--- a", "!\\[a", "```a"])
def test_text_at_the_beginning_of_a_line_begins_nothing(start: str) -> None:
    from halfbyte.report.model_card import escape

    assert re.match(r"\\|\d\\", escape(start))


def test_no_folder_of_the_machine_is_published(out: Path, tmp_path: Path) -> None:
    document = read_json(results_of(out, tmp_path / "r.json"))
    document["command"] = (
        "/home/me/venv/bin/halfbyte evaluate /home/me/secret/out --against=/data/private/model --text ~/diary/t.txt "
        "'C:\\Users\\me\\x.txt' -o ../hidden/r.json"
    )
    document["rows"][1]["name"] = "/home/me/secret/out"
    text = model_card(out, [write(tmp_path / "paths.json", document)]).text
    assert "`halfbyte evaluate out --against=model --text t.txt x.txt -o r.json`" in text
    assert not re.search("home|secret|private|diary|Users|hidden", text)


def test_the_error_weighted_by_activations_is_what_the_conversion_noted(out: Path, tmp_path: Path) -> None:
    results = results_of(out, tmp_path / "r.json")
    assert "weighted by the activations" not in model_card(out, [results]).text
    made = json.loads((out / "halfbyte.json").read_text())
    made["calibrated_errors"] = {"a": ["2.000000e-01", "4.000000e+01"], "b": ["4.000000e-01", "2.000000e+01"]}
    (out / "halfbyte.json").write_text(json.dumps(made))
    assert "2 calibrated weights, relative to their squares: 0.01000, weighted by" in model_card(out, [results]).text


@pytest.mark.parametrize(
    "change",
    [{"recipe": []}, {"recipe": {"name": 1}}, {"recipe": {"rules": [1]}}, {"source": {"name": {}}}, {"importance": 3}],
)
def test_a_record_with_other_types_gives_one_sentence(out: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    results = results_of(out, tmp_path / "r.json")
    made = json.loads((out / "halfbyte.json").read_text()) | change
    (out / "halfbyte.json").write_text(json.dumps(made))
    with pytest.raises(HalfbyteError, match=r"halfbyte\.json"):
        model_card(out, [results])
