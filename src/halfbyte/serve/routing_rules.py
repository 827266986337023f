"""The file of routing rules: ordered, the first match wins; a request that no rule matches takes the default."""

from __future__ import annotations

import math
import re
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from halfbyte.checkpoint.files import read_small
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.models.regex import REGEX, Patterns, check_expression
from halfbyte.models.strict_yaml import MAX_LENGTH, load_yaml
from halfbyte.recipes.recipe import nearest
from halfbyte.serve.language import LANGUAGES
from halfbyte.serve.request_facts import RequestFacts

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
DEFAULT_RULE, FIXED_RULE, ASKED_RULE, EMBEDDINGS_RULE = "default", "only-model", "asked-for", "embeddings"
RESERVED = frozenset({DEFAULT_RULE, FIXED_RULE, ASKED_RULE, EMBEDDINGS_RULE})


def _a_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is no name: letters, digits, `-`, `_` and `.`, at most 64")
    return value


Name = Annotated[str, AfterValidator(_a_name)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Span(_Strict):
    """A range of whole numbers, both ends included; an end that is left out is open."""

    at_least: int | None = Field(default=None, ge=0)
    at_most: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _not_empty(self) -> Span:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give `at_least`, `at_most` or both")
        return self

    def holds(self, value: int) -> bool:
        """Whether a number lies in the range."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)


class Measured(_Strict):
    """What `halfbyte evaluate --by-task` found for a rule at one precision."""

    kl: float = Field(ge=0)
    answer_length: float | None = Field(default=None, ge=0)
    valid_tool_calls: float | None = Field(default=None, ge=0, le=1)
    prompts: int = Field(ge=1)


class RoutingRule(_Strict):
    """One rule: conditions on a request, and the precision of requests that meet them all.

    `keywords` and `patterns` are one condition: any of them is enough. Keywords are words or phrases, in any case;
    patterns are Python regular expressions that are matched in linear time. `all_of`: of every list of keywords, one.
    `look_in` names the text. `length` counts characters of all messages, `max_tokens` is the request's own limit.
    """

    name: Name
    precision: Name
    description: str = ""
    keywords: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    all_of: tuple[tuple[str, ...], ...] = ()
    look_in: Literal["last_user", "user", "system", "everything"] = "last_user"
    tools: bool | None = None
    images: bool | None = None
    length: Span | None = None
    max_tokens: Span | None = None
    turns: Span | None = None
    language: tuple[str, ...] = ()
    measured: dict[str, Measured] = Field(default_factory=dict)

    @field_validator("keywords", "patterns", "language", mode="before")
    @classmethod
    def _tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("all_of", mode="before")
    @classmethod
    def _tuples_of_tuples(cls, value: Any) -> Any:
        return tuple(tuple(v) if isinstance(v, list) else v for v in value) if isinstance(value, list) else value

    @field_validator("keywords")
    @classmethod
    def _keywords_have_letters(cls, keywords: tuple[str, ...]) -> tuple[str, ...]:
        if any(not keyword.strip() for keyword in keywords):
            raise ValueError("a keyword is empty")
        return keywords

    @field_validator("all_of")
    @classmethod
    def _groups_have_keywords(cls, groups: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        if any(not group or any(not keyword.strip() for keyword in group) for group in groups):
            raise ValueError("a list of keywords is empty, or a keyword in it")
        return groups

    @field_validator("patterns")
    @classmethod
    def _patterns_are_linear(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            problem = check_expression(f"(?i){pattern}")
            if "(?=" in pattern or "(?!" in pattern:
                problem = "it looks ahead; write `all_of` for texts that must hold several words"
            if problem:
                raise ValueError(f"{pattern[:100]!r} cannot be used: {problem}")
        return patterns

    @field_validator("language")
    @classmethod
    def _languages_are_known(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        for language in languages:
            if language not in LANGUAGES:
                raise ValueError(f"the language {language[:20]!r} is not one of {', '.join(LANGUAGES)}")
        return languages

    @model_validator(mode="after")
    def _has_a_condition(self) -> RoutingRule:
        if self.name in RESERVED:
            raise ValueError(f"the name {self.name!r} is the router's own; choose another one")
        texts = self.keywords or self.patterns or self.all_of or self.language
        others = (self.tools, self.images, self.length, self.max_tokens, self.turns)
        if not texts and all(other is None for other in others):
            raise ValueError("it has no condition; requests that no rule matches take `default`")
        return self

    @cached_property
    def compiled(self) -> Patterns:
        """The rule's patterns as one automaton."""
        return Patterns([f"{REGEX}(?i){pattern}" for pattern in self.patterns], f"rule {self.name}", anywhere=True)

    def matches(self, facts: RequestFacts) -> bool:
        """Whether a request meets every condition."""
        return (
            (self.tools is None or self.tools == facts.tools)
            and (self.images is None or self.images == facts.images)
            and (self.length is None or self.length.holds(facts.length))
            and (self.turns is None or self.turns.holds(facts.turns))
            and (self.max_tokens is None or (facts.max_tokens is not None and self.max_tokens.holds(facts.max_tokens)))
            and (not self.language or facts.language in self.language)
            and self._reads(getattr(facts, self.look_in))
        )

    def _reads(self, text: str) -> bool:
        lowered = text.lower()
        if not all(any(has_keyword(lowered, keyword) for keyword in group) for group in self.all_of):
            return False
        if not self.keywords and not self.patterns:
            return True
        if any(has_keyword(lowered, keyword) for keyword in self.keywords):
            return True
        return bool(self.patterns) and self.compiled.match(text)


class RoutingRules(_Strict):
    """Rules in order; `default` and every rule's `precision` are a model's name (`nvfp4`) or a class (`4bit`)."""

    name: str = "rules"
    description: str = ""
    source: str = ""
    default: Name
    embeddings: Name | None = None
    rules: tuple[RoutingRule, ...]

    @field_validator("rules", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _names_differ(self) -> RoutingRules:
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rules have the name {name!r}")
        return self


def has_keyword(lowered: str, keyword: str) -> bool:
    """Whether a text in lower case has a keyword, as whole words where the keyword's ends are ASCII letters."""
    keyword = keyword.lower()
    start = lowered.find(keyword)
    while start >= 0:
        end = start + len(keyword)
        if _is_edge(lowered, start - 1, keyword[0]) and _is_edge(lowered, end, keyword[-1]):
            return True
        start = lowered.find(keyword, end)
    return False


def _is_edge(text: str, position: int, letter: str) -> bool:
    """Whether a word ends beside ``letter``; Chinese and Japanese write no spaces, so only ASCII letters bind."""
    if not (letter.isascii() and letter.isalnum()) or not 0 <= position < len(text):
        return True
    neighbour = text[position]
    return not (neighbour.isascii() and (neighbour.isalnum() or neighbour == "_"))


def builtin_rules() -> list[str]:
    """Names of the rules files that come with halfbyte."""
    folder = resources.files("halfbyte.serve") / "rules"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_rules(name_or_path: str | Path) -> RoutingRules:
    """Read rules that come with halfbyte, by name, or a file; HalfbyteError names the file and the rule."""
    if str(name_or_path) in builtin_rules():
        file = resources.files("halfbyte.serve") / "rules" / f"{name_or_path}.yaml"
        return parse_rules(file.read_text(encoding="utf-8"), file.name)
    path = Path(name_or_path)
    try:
        text = read_small(path, MAX_LENGTH).decode("utf-8")
    except UnicodeDecodeError:
        raise HalfbyteError(f"the rules {path} cannot be read: they are not UTF-8 text") from None
    except CheckpointError as error:
        hint = "" if path.suffix else f"; built-in rules are {', '.join(builtin_rules())}"
        reason = getattr(error.__cause__, "strerror", None) or error
        raise HalfbyteError(f"the rules {path} cannot be read: {reason}{hint}") from None
    return parse_rules(text, str(path))


def parse_rules(text: str, where: str) -> RoutingRules:
    """Read rules from YAML text; HalfbyteError names ``where``, the rule and the nearest known key."""
    try:
        data = load_yaml(text)
    except ValueError as error:
        raise HalfbyteError(f"{where}: {error}") from None
    if not isinstance(data, dict):
        raise HalfbyteError(f"{where}: routing rules are a mapping with the keys `default` and `rules`")
    try:
        return RoutingRules.model_validate(data)
    except ValidationError as error:
        raise HalfbyteError(_first_problem(error, where)) from None


def bits_of_class(precision: str) -> float:
    """The bits of a class such as `4bit`; NaN for a model's name."""
    match = re.fullmatch(r"(\d{1,2})-?bit", precision)
    return float(match[1]) if match else math.nan


def _first_problem(error: ValidationError, where: str) -> str:
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    location = list(problem["loc"])
    known = list(RoutingRules.model_fields)
    if len(location) > 1 and location[0] == "rules" and isinstance(location[1], int):
        where, location, known = f"{where}, rule {location[1] + 1}", location[2:], list(RoutingRule.model_fields)
    key = str(location[0]) if location else ""
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}{nearest(key, known)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {key}: {message}" if key else f"{where}: {message}"
