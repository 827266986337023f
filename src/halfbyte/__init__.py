"""halfbyte: 4-bit language models, any format exactly, straight from file to file.

The words of the command line are functions here: ``inspect``, ``plan``, ``quantize``, ``convert``, ``verify``,
``evaluate``; and ``load`` gives a transformers model, ``encode`` quantizes an array. Nothing is imported before it is
used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.api import (
        convert,
        convert_files,
        encode,
        evaluate,
        finish,
        generate,
        inspect,
        load,
        plan,
        quantize,
        verify,
    )
    from halfbyte.audit.run_audit import audit
    from halfbyte.checkpoint import Inventory
    from halfbyte.errors import HalfbyteError
    from halfbyte.formats import QuantizedTensor, get_format, list_formats
    from halfbyte.plugins import load_plugin
    from halfbyte.recipes import list_recipes, load_recipe
    from halfbyte.train import Distill, export, prepare

__version__ = "0.1.0"

__all__ = [
    "Distill",
    "HalfbyteError",
    "Inventory",
    "QuantizedTensor",
    "__version__",
    "audit",
    "convert",
    "convert_files",
    "encode",
    "evaluate",
    "export",
    "finish",
    "generate",
    "get_format",
    "inspect",
    "list_formats",
    "list_recipes",
    "load",
    "load_plugin",
    "load_recipe",
    "plan",
    "prepare",
    "quantize",
    "verify",
]

_WORDS = (
    "audit",
    "convert",
    "convert_files",
    "encode",
    "evaluate",
    "finish",
    "generate",
    "inspect",
    "load",
    "plan",
    "quantize",
    "verify",
)
_HOME = {
    **dict.fromkeys(_WORDS, "halfbyte.api"),
    "audit": "halfbyte.audit.run_audit",
    "HalfbyteError": "halfbyte.errors",
    "Inventory": "halfbyte.checkpoint",
    **dict.fromkeys(("QuantizedTensor", "get_format", "list_formats"), "halfbyte.formats"),
    **dict.fromkeys(("list_recipes", "load_recipe"), "halfbyte.recipes"),
    "load_plugin": "halfbyte.plugins",
    **dict.fromkeys(("Distill", "export", "prepare"), "halfbyte.train"),
}
# what plugins themselves import, and what does not depend on them
_WITHOUT_PLUGINS = ("HalfbyteError", "Inventory", "QuantizedTensor", "load_plugin")


class _Package(ModuleType):
    """Some words are also names of modules: ``halfbyte.plan`` stays the function, whatever was imported before."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WORDS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
        if name not in _WITHOUT_PLUGINS:
            import_module("halfbyte.plugins").load_installed_with_warnings()
        value = getattr(import_module(home), name)
        super().__setattr__(name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
