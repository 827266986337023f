"""Arguments under the names that they had in the release before: read for one release more, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def accepts_old_names(**names: str) -> Callable[[Function], Function]:
    """Make a function accept keyword arguments by old names (``old="new"``), with a FutureWarning for each.

    TypeError where a caller gives both names.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got {new!r} and its old name {old!r}; give only {new!r}")
                message = f"the argument {old!r} of {function.__name__}() is now {new!r}; this release reads both"
                warnings.warn(message, FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(Function, call)

    return decorate
