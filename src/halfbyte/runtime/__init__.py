"""Running quantized models with torch and transformers (neither is imported before it is used)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.runtime.loading import load, load_tokenizer

__all__ = ["load", "load_tokenizer", "need_torch"]


def __getattr__(name: str) -> Any:
    if name in ("load", "load_tokenizer"):
        need_torch()
        from halfbyte.runtime import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def need_torch() -> None:
    """Raise HalfbyteError, with the command that installs them, if torch or transformers is missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise HalfbyteError(
            f"running a model needs torch and transformers ({error}); install them with: "
            "pip install 'halfbyte[transformers]'"
        ) from error
