from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.runtime import load, load_tokenizer
from halfbyte.runtime.generation import Generator, Sampling

PROMPT = "The city of London is"
MODELS = ["qwen3-tiny-wiki", "qwen35moe-tiny-wiki"]


@pytest.fixture(scope="module")
def models(shared: Path) -> dict[str, tuple[Any, Any]]:
    """Trained models, dense and hybrid, with their tokenizers."""
    paths = {name: shared / "data" / "models" / name for name in MODELS}
    return {name: (load(path, "float32"), load_tokenizer(path)) for name, path in paths.items()}


def test_the_sampling_of_nothing_is_refused() -> None:
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_tokens": 0}, {"stop": ("",)}):
        with pytest.raises(HalfbyteError, match="sampling needs"):
            Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_the_likeliest_tokens_are_those_of_transformers(name: str, models: dict[str, Any]) -> None:
    model, tokenizer = models[name]
    generator = Generator(model, tokenizer)
    found = "".join(generator.complete(PROMPT, Sampling(max_tokens=20)))
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert found == tokenizer.decode(expected, skip_special_tokens=True)
    assert generator.counts.prompt_tokens == ids.shape[1] and generator.counts.tokens <= 20
    assert generator.counts.tokens_per_second > 0


def test_a_seed_makes_samples_repeatable(models: dict[str, Any]) -> None:
    generator = Generator(*models["qwen3-tiny-wiki"])

    def text(seed: int, **more: Any) -> str:
        return "".join(generator.complete(PROMPT, Sampling(temperature=1.5, seed=seed, max_tokens=12, **more)))

    assert text(1) == text(1) != text(2)
    likeliest = "".join(generator.complete(PROMPT, Sampling(max_tokens=12)))
    assert text(1, top_k=1) == text(2, top_p=1e-6) == likeliest


def test_an_answer_ends_before_a_stop_string_however_it_is_cut_into_tokens(models: dict[str, Any]) -> None:
    generator = Generator(*models["qwen3-tiny-wiki"])
    whole = "".join(generator.complete(PROMPT, Sampling(max_tokens=24)))
    stop = whole[10:16]
    pieces = list(generator.complete(PROMPT, Sampling(max_tokens=24, stop=("nowhere", stop))))
    assert "".join(pieces) == whole[: whole.find(stop)]
    assert generator.counts.finish == "stop"


def test_a_conversation_goes_on_from_what_is_cached(models: dict[str, Any]) -> None:
    model, tokenizer = models["qwen35moe-tiny-wiki"]
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        generator = Generator(model, tokenizer)
        ids = tokenizer(PROMPT)["input_ids"]
        first = list(generator.continue_tokens(ids, Sampling(max_tokens=3)))
        assert first and seen[0] == len(ids)
        seen.clear()
        longer = [*generator._cached, 7, 8, 9]
        again = "".join(generator.continue_tokens(longer, Sampling(max_tokens=4)))
        assert seen[0] == 3
        assert again == "".join(Generator(model, tokenizer).continue_tokens(longer, Sampling(max_tokens=4)))
    finally:
        handle.remove()


def test_an_interrupted_answer_leaves_nothing_half_cached(models: dict[str, Any]) -> None:
    model, tokenizer = models["qwen3-tiny-wiki"]
    generator = Generator(model, tokenizer)
    expected = "".join(generator.complete(PROMPT, Sampling(max_tokens=6)))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        list(generator.complete(PROMPT, Sampling(max_tokens=6)))
    handle.remove()
    assert "".join(generator.complete(PROMPT, Sampling(max_tokens=6))) == expected


def test_a_chat_needs_a_template_and_a_prompt_room(models: dict[str, Any]) -> None:
    model, tokenizer = models["qwen3-tiny-wiki"]
    messages = [{"role": "user", "content": "Where is London?"}]
    assert "".join(Generator(model, tokenizer).chat(messages, Sampling(max_tokens=4)))
    with pytest.raises(HalfbyteError, match="the prompt has no tokens"):
        Generator(model, tokenizer).continue_tokens([], Sampling())
    with pytest.raises(HalfbyteError, match="tokens, and the model has"):
        Generator(model, tokenizer).continue_tokens([1] * 10**6, Sampling())

    class Plain:
        chat_template = None

    with pytest.raises(HalfbyteError, match="no chat template"):
        Generator(model, Plain()).chat(messages, Sampling())
