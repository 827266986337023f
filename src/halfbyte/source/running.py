"""How engines run a checkpoint, and what is known to go wrong there (``compatibility/engine_facts.yaml``)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from halfbyte.compatibility.engine_facts import CompatibilityNote
from halfbyte.source.overview import Overview

HALFBYTE, TRANSFORMERS, VLLM, MLX, LLAMA_CPP = "halfbyte", "transformers", "vLLM", "mlx-lm", "llama.cpp"
EFFECTS = {"wrong": " computes wrong numbers:", "refuses": " does not load it:", "loses": " loses", "needs": " needs"}
NATIVE = {
    VLLM: ("halfbyte", "compressed-tensors", "modelopt", "fp8", "gpt-oss"),
    TRANSFORMERS: ("halfbyte", "compressed-tensors", "fp8", "gpt-oss"),
    MLX: ("mlx",),
    LLAMA_CPP: ("gguf",),
    HALFBYTE: ("halfbyte", "compressed-tensors", "modelopt", "mlx", "fp8", "gpt-oss"),
}
"""Dialects that an engine runs without converting them, in the order in which a card names the engines."""


def file_of(out: str) -> str:
    """What to open of an output: the folder, or the only weight file in it where that holds everything (GGUF)."""
    from pathlib import Path

    files = sorted(Path(out).glob("*.gguf"))
    return str(files[0]) if files and not (Path(out) / "config.json").is_file() else out


def library_of(summary: Overview) -> str | None:
    """The hub's ``library_name``: the first library that is known to load it right; None where nothing is quantized."""
    if summary.dialect == "gguf":
        return "gguf"
    if summary.dialect == "mlx":
        return "mlx"
    usable = [name for name in (TRANSFORMERS, VLLM, HALFBYTE) if runs(summary, name)]
    is_halfbyte = summary.dialect == "halfbyte"
    return None if summary.dialect is None else HALFBYTE if is_halfbyte or not usable else usable[0].lower()


def runs(summary: Overview, engine: str) -> bool:
    """Whether nothing known speaks against running it with this engine."""
    if summary.dialect not in NATIVE[engine]:
        return False
    return not any(
        f.effect in ("wrong", "refuses", "unknown") and not f.hardware for f in summary.engines.get(engine, [])
    )


def usage(summary: Overview, place: str) -> Iterator[tuple[str, str, str]]:
    """Engine, language of the snippet, snippet. ``place``: a folder or a repository's name."""
    known = summary.engines.get(VLLM, [])
    plugin = _plugin_loads(summary) or any(f.effect == "needs" and not f.hardware for f in known)
    if runs(summary, VLLM) or plugin:
        preparation = "pip install halfbyte    # into vLLM's environment: its plugin decodes the weights\n"
        install = preparation if plugin else ""
        yield VLLM, "sh", f"{install}vllm serve {shlex.quote(place)}"
    if runs(summary, TRANSFORMERS):
        needs = "# pip install transformers compressed-tensors\n" if summary.dialect == "compressed-tensors" else ""
        preparation = (
            "import halfbyte.transformers  # registers the format\n" if summary.dialect == "halfbyte" else needs
        )
        load = f'AutoModelForCausalLM.from_pretrained({json.dumps(place)}, dtype="auto")'
        yield TRANSFORMERS, "python", f"{preparation}from transformers import AutoModelForCausalLM\n\nmodel = {load}"
    if runs(summary, MLX):
        yield MLX, "sh", f"mlx_lm.server --model {shlex.quote(place)}"
    if summary.dialect == "gguf":
        yield LLAMA_CPP, "sh", f"llama-server -m {shlex.quote(f'{place}/{min(summary.files)}')}"
    if runs(summary, HALFBYTE):
        load = f"halfbyte.load({json.dumps(place)})  # to check and to measure, not to serve"
        yield HALFBYTE, "python", f"import halfbyte\n\nmodel = {load}"


def cautions(summary: Overview) -> list[str]:
    """What engines are known to lose, refuse or get wrong, a sentence each."""
    return [_sentence(f) for known in summary.engines.values() for f in known if f.effect != "unknown"]


def untried(summary: Overview) -> list[str]:
    """Engines of which nothing is known for this dialect."""
    return [name for name, known in summary.engines.items() if any(f.effect == "unknown" for f in known)]


def _plugin_loads(summary: Overview) -> bool:
    """vLLM alone gets MixFP4 wrong; with halfbyte beside it, its plugin loads it."""
    wrong = [f for f in summary.engines.get(VLLM, []) if f.effect == "wrong" and not f.hardware]
    return (
        bool(wrong) and summary.dialect == "compressed-tensors" and all("halfbyte installed" in f.what for f in wrong)
    )


def _sentence(note: CompatibilityNote) -> str:
    where = f"{note.engine} {note.version}".rstrip() + (f" on {note.hardware}" if note.hardware else "")
    effect = EFFECTS.get(note.effect, "")
    source = " (read in its source, not run)" if note.known == "read" else ""
    return f"{where}{effect} {note.what}{source}" + (f"; {note.link}" if note.link else "")
