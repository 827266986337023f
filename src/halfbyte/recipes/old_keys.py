"""Keys of recipes from before 0.2, which stay readable for one release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

OLD_KEYS = {
    "tensor_scale": "global_scale",
    "search": "scale_search",
    "indivisible": "if_not_divisible",
    "weight": "error_weight",
    "method": "rounding",
    "mode": "objective",
}
_VALUES: dict[str, dict[Any, dict[str, Any]]] = {
    "weight": {"local_hessian": {"objective": "local_hessian"}},
    "method": {"nearest": {"rounding": "rtn"}},
    "mode": {
        "in_loop": {"objective": "gptq_loss"},
        "compensated": {"objective": "squared_error"},
        "static": {"static_groups": True},
    },
}
"""Old values whose meaning has another spelling; every other value goes to the key's new name unchanged."""


class Renamed(NamedTuple):
    """A rule under the keys of today, and what each old key of it became."""

    content: dict[Any, Any]
    replaced: dict[str, str]


def replace_old_keys(rule: Mapping[Any, Any]) -> Renamed:
    """Translate the old keys of a rule; ValueError where it says the same thing under an old and a new name."""
    content, replaced = {key: value for key, value in rule.items() if key not in OLD_KEYS}, {}
    for old in (key for key in rule if key in OLD_KEYS):
        new = _translated(old, rule[old])
        twice = sorted(new.keys() & content.keys())
        if twice:
            raise ValueError(f"`{twice[0]}` is given twice, once under its old name")
        content |= new
        replaced[old] = next(iter(new))
    return Renamed(content, replaced)


def _translated(key: str, value: Any) -> dict[str, Any]:
    values = _VALUES.get(key, {})
    return values[value] if isinstance(value, str) and value in values else {OLD_KEYS[key]: value}
