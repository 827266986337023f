"""Chat templates end, whatever they say."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.runtime.templates import apply_template

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


class Tokenizer:
    def __init__(self, template: str) -> None:
        self.template = template

    def apply_chat_template(self, messages: list[Any], **options: Any) -> str:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        return str(_compile_jinja_template(self.template).render(messages=messages))


def test_a_template_that_ends_is_applied() -> None:
    assert apply_template(Tokenizer("{{ messages[0] }}!"), ["hello"]) == "hello!"


def test_a_template_that_does_not_end_is_stopped_in_any_thread() -> None:
    began, errors = time.monotonic(), []

    def run() -> None:
        try:
            apply_template(Tokenizer(LOOP), [], 0.3)
        except HalfbyteError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    run()
    for thread in threads:
        thread.join()
    assert len(errors) == 3 and "takes longer than 0.3 s" in errors[0]
    assert time.monotonic() - began < 20


def test_an_error_of_the_template_stays_what_it_is() -> None:
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError):
        apply_template(Tokenizer("{{ raise_exception('no') }}"), [])
