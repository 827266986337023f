"""Plugins: formats, searches, dialects, families, recipes and commands of others, from packages or single files.

A plugin is Python that calls ``register``, ``register_search``, ``register_dialect``, ``register_family``,
``register_recipe`` or ``register_command`` while it is imported. An installed package names such a module as an entry
point of one of the ``GROUPS``; ``load_plugin`` takes a file. docs/extending.md builds one of each.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import warnings
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from halfbyte.errors import HalfbyteError

GROUPS = tuple(f"halfbyte.{kind}" for kind in ("formats", "searches", "dialects", "families", "recipes", "commands"))
_loaded: dict[Path, ModuleType] = {}
_installed: list[str] | None = None


class PluginError(HalfbyteError):
    """A plugin cannot be imported, or takes a name that is in use."""


def load_plugin(path: str | Path) -> ModuleType:
    """Import a plugin from a Python file, once in this process; PluginError where it cannot be used.

    What the file registers stays until the process ends. The module is returned.
    """
    place = Path(path).resolve()
    if place in _loaded:
        return _loaded[place]
    if not place.is_file():
        raise PluginError(f"there is no plugin file {path}")
    # two files of one name are two modules
    name = f"halfbyte_plugin_{place.stem}_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise PluginError(f"the plugin {path} is no Python file; give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"the plugin {path} cannot be loaded: {_in_words(error, place)}") from error
    _loaded[place] = module
    return module


def load_installed() -> list[str]:
    """Import the plugins of installed packages, once in this process; the sentences about those that failed.

    One that cannot be imported or that takes a name in use is left out.
    """
    global _installed
    if _installed is None:
        _installed = []  # a plugin may use what looks for plugins
        points = {(point.value, point.name): point for group in GROUPS for point in entry_points(group=group)}
        _installed += [problem for point in points.values() if (problem := _load(point))]
    return _installed


def load_installed_with_warnings() -> None:
    """Import the plugins of installed packages; a UserWarning for each that failed, the first time."""
    first = _installed is None
    for problem in load_installed() if first else ():
        warnings.warn(problem, UserWarning, stacklevel=3)


def _load(point: EntryPoint) -> str | None:
    try:
        point.load()
    except Exception as error:
        package = f" of the package {point.dist.name}" if point.dist else ""
        return f"the plugin {point.name}{package} is left out: {_in_words(error)}"
    return None


def _in_words(error: Exception, place: Path | None = None) -> str:
    """What went wrong, and in which line of the plugin where that helps."""
    text = " ".join(str(error).split())
    if isinstance(error, HalfbyteError):
        return text
    lines = [] if place is None else [line for file, line in _frames(error) if file == str(place)]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {text}{where}"


def _frames(error: Exception) -> list[tuple[str, int]]:
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return frames
