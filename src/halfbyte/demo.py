"""The bundled model in several formats, verified and compared: what ``halfbyte demo`` shows. Nothing is fetched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from halfbyte.convert.conversion import convert
from halfbyte.errors import HalfbyteError, MeasurementError, VerifyError
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify

MODEL = Path(str(resources.files("halfbyte") / "demo_model"))
TEXT = MODEL / "heldout.txt"
LENGTH = 256
RECIPES = ("mxfp4", "nvfp4-absmax", "nvfp4-four-over-six", "nvfp4", "mixfp4-absmax", "mixfp4")
"""From the largest error to the least, as the formats and searches promise."""

Status = Callable[[str], AbstractContextManager[Any]]


@dataclass
class DemoRow:
    """One recipe's outcome. ``bytes`` are those of the tensors; perplexity, KL (nats) and top-1 need torch."""

    recipe: str
    bytes: int
    bits_per_weight: float
    relmse: float
    seconds: float
    verified: bool = True
    perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None


@dataclass
class Demo:
    """The comparison; ``note`` says why perplexity is missing, if it is."""

    source_bytes: int
    source_parameters: int
    source_perplexity: float | None = None
    rows: list[DemoRow] = field(default_factory=list)
    note: str = ""
    protocol: dict[str, Any] | None = None
    seconds: float = 0.0

    @property
    def source_bits_per_weight(self) -> float:
        """8 x bytes / parameters of the source."""
        return 8 * self.source_bytes / self.source_parameters


def run_demo(folder: Path, threads: int | None = None, status: Status | None = None) -> Demo:
    """Quantize the bundled model with each of RECIPES into ``folder``, verify it, evaluate it on its held-out text.

    ``status`` gives a context manager that shows what is being done. VerifyError if an output is not right.
    """
    began = time.monotonic()
    doing = status or (lambda _: nullcontext())
    checkpoint = Checkpoint.open(MODEL)
    demo = Demo(checkpoint.inventory.total_bytes, _parameters(checkpoint))
    for recipe in RECIPES:
        with doing(f"{recipe}: quantizing and verifying"):
            plan = make_plan(checkpoint, recipe)
            done = convert(plan, folder / recipe, threads)
            checked = verify(folder / recipe, MODEL)
        if not checked.ok:
            raise VerifyError(f"{recipe}: {checked.problems[0]}")
        demo.rows.append(DemoRow(recipe, plan.data_bytes, plan.bits_per_weight, checked.relmse, done.seconds))
    with doing("evaluating"):
        _evaluate(demo, folder)
    demo.seconds = time.monotonic() - began
    return demo


def _evaluate(demo: Demo, folder: Path) -> None:
    """Perplexity, KL and top-1 against the source; without torch, a note that says how to get them."""
    try:
        from halfbyte.evaluate import evaluate
    except HalfbyteError as error:
        demo.note = f"no perplexity and no KL: {error}"
        return
    folders = [folder / row.recipe for row in demo.rows]
    first, *rows = evaluate(folders, against=MODEL, text=TEXT, length=LENGTH, dequantize=True)
    demo.source_perplexity = first["perplexity"]
    demo.protocol = first["protocol"]
    if invalid := next((row["invalid"] for row in (first, *rows) if row["invalid"]), None):
        raise MeasurementError(invalid)
    for row, values in zip(demo.rows, rows, strict=True):
        row.perplexity = values["perplexity"]
        row.kl = values["kl"]["mean"]
        row.top1 = values["kl"]["top1"]


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(weight.shape) for weight in checkpoint.weights)
