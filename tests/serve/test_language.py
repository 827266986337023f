"""Languages of texts."""

from __future__ import annotations

import pytest

from halfbyte.serve.language import LANGUAGES, language_of

TEXTS = {
    "en": "How do I write a letter to the bank, and what is it that they need from me?",
    "de": "Bitte schreiben Sie mir einen Brief an die Bank, das ist für mich nicht so einfach.",
    "fr": "Je voudrais une lettre pour la banque, avec les documents que vous avez.",
    "es": "Quiero una carta para el banco, pero no sé cómo es que se escribe.",
    "it": "Vorrei una lettera per la banca, come sono i documenti che non ho più?",
    "pt": "Eu quero uma carta para o banco, mas não sei como isso é feito em geral.",
    "nl": "Ik wil een brief aan de bank, maar dat is voor mij niet zo eenvoudig, hoe moet het?",
    "zh": "请帮我写一封信给银行。",
    "ja": "銀行への手紙を書いてください。",
    "ko": "은행에 보낼 편지를 써 주세요.",
    "ru": "Напишите мне письмо в банк.",
    "ar": "اكتب لي رسالة إلى البنك",
    "el": "Γράψε μου ένα γράμμα προς την τράπεζα",
}


@pytest.mark.parametrize(("language", "text"), TEXTS.items())
def test_a_sentence_shows_its_language(language: str, text: str) -> None:
    assert language_of(text) == language and language in LANGUAGES


@pytest.mark.parametrize("text", ["", "   ", "12345 !!", "zzz qqq"])
def test_a_text_without_known_words_has_no_language(text: str) -> None:
    assert language_of(text) == ""


def test_code_words_in_a_chinese_prompt_do_not_hide_it() -> None:
    assert language_of("请修复这个 Python 函数的错误") == "zh"
