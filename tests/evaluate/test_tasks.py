from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import torch

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.evaluation import Settings, measure
from halfbyte.evaluate.tasks import PREFIX, prepare, prompt, read_questions, run_tasks
from halfbyte.runtime import load, load_tokenizer
from small_models import linear, run

COUNT = 20


@pytest.fixture(scope="module")
def model_path(shared: Path) -> Path:
    return shared / "data/models/qwen3-tiny-wiki"


@pytest.fixture(scope="module")
def model(model_path: Path) -> Any:
    return load(model_path, "float32")


@pytest.fixture(scope="module")
def questions(shared: Path) -> list[dict[str, Any]]:
    return read_questions(shared / "data/eval/mmlu_pro/mmlu_pro_test_subset280.jsonl")[100 : 100 + COUNT]


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
    return path


@torch.inference_mode()
def likeliest(model: Any, path: Path, item: dict[str, Any]) -> int:
    """The letter that the model gives the highest probability, without the harness."""
    tokenizer = load_tokenizer(path)
    messages = [{"role": "user", "content": prompt(item)}, {"role": "assistant", "content": PREFIX}]
    start = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    first = tokenizer(start, add_special_tokens=False)["input_ids"]
    scores = []
    for i in range(len(item["options"])):
        ids = tokenizer(f"{start} {'ABCDEFGHIJ'[i]}", add_special_tokens=False)["input_ids"]
        assert ids[: len(first)] == first
        logits = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
        scores.append(sum(logits[k - 1, ids[k]].item() for k in range(len(first), len(ids))))
    return max(range(len(scores)), key=scores.__getitem__)


@pytest.mark.slow
def test_answers_are_scored_as_the_model_s_own_probabilities_say(
    model: Any, model_path: Path, questions: list[dict[str, Any]], tmp_path: Path
) -> None:
    best = [likeliest(model, model_path, item) for item in questions]
    # rigged: half of the questions have what the model prefers as their answer, the others the option after it
    rigged = [
        {**item, "answer_index": b if i % 2 else (b + 1) % len(item["options"])}
        for i, (item, b) in enumerate(zip(questions, best, strict=True))
    ]
    tasks = prepare(["mmlu_pro"], write(tmp_path / "questions.jsonl", rigged))
    found = run_tasks(tasks, model, load_tokenizer(model_path))["mmlu_pro"]
    assert found["correct"] == "01" * (COUNT // 2)
    assert (found["metric"], found["value"], found["questions"]) == ("acc", 0.5, COUNT)
    assert found["ci"][0] < 0.5 < found["ci"][1]
    assert sum(c["questions"] for c in found["by_category"].values()) == COUNT
    assert "no reasoning" in found["protocol"] and "chat template" in found["protocol"]


@pytest.mark.slow
def test_checkpoints_are_compared_question_by_question(
    model_path: Path, questions: list[dict[str, Any]], tmp_path: Path
) -> None:
    run(model_path, tmp_path / "mxfp4", linear("mxfp4"))
    file = write(tmp_path / "questions.jsonl", questions)
    settings = Settings(tasks=("mmlu_pro",), questions=file, limit=10)
    found = measure(tmp_path / "mxfp4", model_path, settings)
    source, row = found["rows"]
    assert source["perplexity"] is None and source["kl"] is None
    (pair,) = found["comparisons"]
    a, b = (r["tasks"]["mmlu_pro"]["correct"] for r in (source, row))
    assert len(a) == len(b) == 10
    assert pair["only_a"] - pair["only_b"] == a.count("1") - b.count("1")
    assert (pair["a"], pair["b"], pair["task"]) == ("qwen3-tiny-wiki", "mxfp4", "mmlu_pro")
    assert 0 < pair["p"] <= 1
    assert "lm_eval" in found["environment"]["versions"]


def test_the_harness_finds_the_loader_by_name(model_path: Path) -> None:
    from lm_eval.api.registry import get_model

    from halfbyte.evaluate.harness import HalfbyteLM

    assert get_model("halfbyte") is HalfbyteLM
    lm = HalfbyteLM(str(model_path), batch_size=1)
    assert type(lm.model).__name__ == "Qwen3ForCausalLM" and lm.tokenizer.vocab_size == 4096


@pytest.mark.slow
def test_prompts_beyond_the_model_s_positions_are_counted(questions: list[dict[str, Any]], tmp_path: Path) -> None:
    demo = Path(halfbyte.__file__).parent / "demo_model"
    two = {"options": ["yes", "no"], "answer_index": 0}
    items = [{**questions[0], **two, "question": "word " * 4000}, {**questions[1], **two}]
    tasks = prepare(["mmlu_pro"], write(tmp_path / "questions.jsonl", items))
    found = run_tasks(tasks, load(demo, "float32"), load_tokenizer(demo))["mmlu_pro"]
    assert found["truncated"] == 1 and "lost their beginning" in found["protocol"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 1 of q.jsonl must hold a JSON object"),
        ('{"question": "?", "options": "ab", "answer_index": 0}', "needs `question` and `options`"),
        ('{"question": "?", "options": ["a", "b"], "answer_index": 2}', "no `answer_index` among its 2 options"),
        ("", "holds no question"),
    ],
)
def test_files_that_hold_no_questions_are_refused(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(HalfbyteError, match=message):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.slow
def test_what_is_asked_for_is_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="--questions FILE"):
        prepare(["mmlu_pro"], None)
    with pytest.raises(HalfbyteError, match="no task 'no_such_task'"):
        prepare(["no_such_task"], None)
    with pytest.raises(HalfbyteError, match="not among arc_easy"):
        prepare(["arc_easy"], tmp_path / "q.jsonl")
