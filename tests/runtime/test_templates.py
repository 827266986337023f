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


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{{ 10 ** (10 ** 9) }}",
        "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] * 9999999999 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ 'a' | center(9999999999) }}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    ],
)
def test_one_step_takes_neither_all_time_nor_all_memory(template: str) -> None:
    from jinja2.exceptions import TemplateError

    began = time.monotonic()
    with pytest.raises((HalfbyteError, TemplateError)):
        apply_template(Tokenizer(template), [], 2.0)
    assert time.monotonic() - began < 10


def test_small_sums_and_repeats_are_computed() -> None:
    template = "{{ '-' * 3 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ '%03d' % 5 }}{{ 6 * 7 }}{{ messages * 2 }}"
    assert apply_template(Tokenizer(template), [1]) == "---1024300542[1, 1]"
