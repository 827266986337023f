"""Packages that come with an extra, and what to install where one is missing."""

from __future__ import annotations

_EXTRAS = {
    "transformers": ("torch", "transformers", "safetensors", "accelerate", "tokenizers"),
    "gguf": ("gguf",),
    "eval": ("lm_eval", "datasets"),
    "allocate": ("highspy",),
    "serve": ("starlette", "uvicorn", "httpx", "prometheus_client"),
    "patch": ("zstandard",),
    "report": ("altair", "vl_convert", "jinja2"),
    "gpu": ("triton",),
}


def missing_extra(error: BaseException) -> str | None:
    """One sentence for a package of an extra that is not installed; None for any other error."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in _EXTRAS.items() if package in packages), None)
    return extra and f"this needs the package {package}, which is not installed: pip install 'halfbyte[{extra}]'"
