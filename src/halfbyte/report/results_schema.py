"""The documents that reports are made of, as docs/evaluation.md describes them; a wrong one is one clear sentence.

Keys that a report does not use are not checked. What was not measured is None or empty.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from halfbyte.report.private_paths import without_folders

Interval = tuple[float, float]


class _Document(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Protocol(_Document):
    """What was measured on what. Two with the same ``key`` can be compared."""

    text: str
    sha256: str
    length: int
    stride: int
    windows: int
    tokens: int
    dtype: str
    kind: str = "text"
    bos: bool = False
    note: str

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that numbers depend on."""
        return (self.sha256, self.length, self.stride, self.tokens, self.dtype, self.kind, self.bos)


class Divergence(_Document):
    """KL(source ‖ checkpoint) per token in nats, and the share of tokens with the same most likely successor."""

    mean: float
    median: float
    p90: float
    p99: float
    top1: float


class DivergenceIntervals(_Document):
    """95 % intervals of the same."""

    mean: Interval | None = None
    median: Interval | None = None
    p90: Interval | None = None
    p99: Interval | None = None
    top1: Interval | None = None


class Ratio(_Document):
    """The perplexity of a checkpoint over that of its source."""

    value: float
    ci: Interval | None = None


class Contents(_Document):
    """Weights stored alike: a format or a dtype."""

    storage: str
    quantized: bool
    roles: tuple[str, ...]
    parameters: int
    bytes: int


class Origin(_Document):
    """What a checkpoint was made from."""

    name: str
    revision: str | None = None
    fingerprint: str | None = None


class Task(_Document):
    """The accuracy of a checkpoint on a task."""

    metric: str
    value: float
    ci: Interval | None = None
    questions: int
    protocol: str
    questions_sha256: str | None = None


class Same(_Document):
    """What a row cannot be told from."""

    kl: tuple[str, ...] = ()
    perplexity: tuple[str, ...] = ()
    noise: bool | None = None


class Scales(_Document):
    """A histogram of the block scales of weights."""

    type: str
    values: tuple[float, ...]
    counts: tuple[int, ...]


class WeightError(_Document):
    """Errors of one weight, or of a class of weights (then without name and layer)."""

    name: str = ""
    role: str
    layer: int | None = None
    format: str
    parameters: int
    relmse: float | None = None
    calibrated_relmse: float | None = None
    sqnr_db: float | None = None
    tables: dict[str, float] = Field(default_factory=dict)
    saturated_blocks: float = 0.0
    scales: Scales | None = None


class ErrorsTotal(_Document):
    """The same over everything that is quantized."""

    parameters: int
    bytes: int
    bits: float
    relmse: float | None = None
    calibrated_relmse: float | None = None


class Errors(_Document):
    """The document of ``halfbyte errors --json``."""

    out: str
    against: str
    importance: str | None = None
    weights: tuple[WeightError, ...] = ()
    classes: tuple[WeightError, ...] = ()
    total: ErrorsTotal


class Row(_Document):
    """The measurements of one checkpoint."""

    name: str
    path: str = ""
    fingerprint: str | None = None
    revision: str | None = None
    loaded_by: str | None = None
    recipe: str | None = None
    dialect: str | None = None
    source: Origin | None = None
    bytes: int | None = None
    repository_bytes: int | None = None
    parameters: int | None = None
    bits_per_weight: float | None = None
    contains: tuple[Contents, ...] = ()
    vision: bool = False
    mtp: bool = False
    dtype: str | None = None
    activations: str | None = None
    protocol: Protocol | None = None
    perplexity: float | None = None
    perplexity_ci: Interval | None = None
    perplexity_ratio: Ratio | None = None
    kl_protocol: Protocol | None = None
    kl: Divergence | None = None
    kl_ci: DivergenceIntervals | None = None
    indistinguishable: Same = Same()
    tasks: dict[str, Task] = Field(default_factory=dict)
    errors: Errors | None = None
    invalid: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _mark_invalid(cls, row: object) -> object:
        """Files of earlier releases hold no ``invalid``: a perplexity that was measured and is no number says it."""
        if isinstance(row, dict) and row.get("protocol") and row.get("perplexity") is None and not row.get("invalid"):
            row = {**row, "invalid": f"the perplexity of {row.get('name')} is not finite"}
        if isinstance(row, dict) and row.get("invalid"):
            row = {**row, **dict.fromkeys(("perplexity", "perplexity_ci", "perplexity_ratio", "kl", "kl_ci"))}
            row = {**row, "indistinguishable": {}, "tasks": {}}
        return row

    @property
    def label(self) -> str:
        """The name, with what activations were rounded to."""
        return f"{self.name} + {self.activations} activations" if self.activations else self.name

    def storage_of(self, *roles: str) -> str | None:
        """How weights of these roles (or below them) are stored; None where there are none."""
        storages = [c.storage for c in self.contains if any(_under(r, role) for r in c.roles for role in roles)]
        return ", ".join(storages) or None


class NoiseFloor(_Document):
    """The source against itself in another dtype."""

    how: str
    kl: Divergence | None = None
    kl_ci: DivergenceIntervals | None = None
    invalid: str | None = None


class Comparison(_Document):
    """Two rows on the questions of one task."""

    task: str
    a: str
    b: str
    only_a: int
    only_b: int
    p: float
    significant: bool


class Environment(_Document):
    """The machine and the versions of packages."""

    machine: str
    cores: int | None = None
    device: str = "cpu"
    versions: dict[str, str] = Field(default_factory=dict)


class Results(_Document):
    """The document of ``halfbyte evaluate --json``."""

    halfbyte: Literal["results"]
    version: Literal[1]
    created: str
    command: str
    environment: Environment
    source: str | None = None
    rows: tuple[Row, ...] = Field(min_length=1)
    noise_floor: NoiseFloor | None = None
    comparisons: tuple[Comparison, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_folders(cls, document: object) -> object:
        """Rows that are named by a path get the name of its last part."""
        return without_folders(document) if isinstance(document, dict) else document


class ErrorsFile(Errors):
    """``halfbyte errors --json`` as a file of its own."""

    halfbyte: Literal["errors"]
    version: Literal[1]


class Group(_Document):
    """A group of weights, quantized while everything else was not."""

    group: str
    roles: tuple[str, ...] = ()
    layers: tuple[int | None, ...] = ()
    format: str
    parameters: int
    bytes: int
    source_bytes: int
    relmse: float | None = None
    kl: Divergence


class Sensitivity(_Document):
    """The document of ``halfbyte sensitivity``."""

    halfbyte: Literal["sensitivity"]
    version: Literal[1]
    source: str
    recipe: str
    by: str
    protocol: Protocol
    groups: tuple[Group, ...]


class FrontierPoint(_Document):
    """The least predicted loss at a size."""

    data_bytes: int
    loss: float


class Allocation(_Document):
    """``halfbyte allocate --json``; ``data_bytes`` and ``predicted_loss`` are those of the recipe that it wrote."""

    recipe: str
    data_bytes: int
    predicted_loss: float
    frontier: tuple[FrontierPoint, ...]


Document = Results | ErrorsFile | Sensitivity | Allocation


def _under(role: str, prefix: str) -> bool:
    return role == prefix or role.startswith(f"{prefix}.")
