"""Where a scale per channel can move between tensors without changing what a model computes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from halfbyte.models.family import Family
from halfbyte.models.name_templates import Templates, normalise, split_numbers
from halfbyte.models.roles import TOWERS, bare_role, is_under
from halfbyte.models.weight import Weight

ProducerKind = Literal["norm", "zero_centred", "bias", "rows"]
# up (with the gate that makes it half of a product), and what reads the product
_PRODUCTS = (
    ("mlp.up", "mlp.gate", "mlp.down"),
    ("mlp.gate_up", "", "mlp.down"),
    ("shared_expert.up", "shared_expert.gate", "shared_expert.down"),
    ("experts.gate_up", "", "experts.down"),
)
# these may read a norm too, which no family file tells
_OBSCURE = ("other", "indexer", "residual", "per_layer", "experts_latent.in", "experts_latent.out")
_PLAIN = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Producer:
    """A tensor that is divided by the scale.

    kind: ``norm``, a norm's weight; ``zero_centred``, one that stands for 1 + w; ``bias``, a vector over the
    channels; ``rows``, a matrix whose rows (first..stop of ``rows``, or all) are the channels.
    """

    weight: Weight
    kind: ProducerKind
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class SmoothingGroup:
    """Producers divided, and the columns of all consumers multiplied, by one scale per channel.

    ``channels`` is the scale's length; ``experts`` the number of its rows where every expert has its own.
    ``refusal`` says why the group must be left as it is, or is None.
    """

    name: str
    producers: tuple[Producer, ...]
    consumers: tuple[Weight, ...]
    channels: int
    experts: int | None = None
    refusal: str | None = None


def find_groups(
    weights: Sequence[Weight],
    family: Family,
    quantized: Collection[str] = (),
    *,
    tied: bool = False,
    products: bool = True,
) -> list[SmoothingGroup]:
    """All groups of a checkpoint, layer by layer; those that cannot be smoothed have a ``refusal``.

    A norm feeds the projections that read it, which are all in its group; with ``products``, the rows of an up
    projection feed the columns of down. ``quantized`` names weights that the source holds quantized, ``tied``
    is the config's tie_word_embeddings.
    """
    layers: dict[tuple[bool, int | None], list[Weight]] = {}
    for weight in weights:
        if not weight.role.startswith(TOWERS):
            layers.setdefault((weight.role.startswith("mtp."), weight.layer), []).append(weight)
    named = {w.name: w for w in weights}
    mtp = any(in_mtp for in_mtp, _ in layers)
    spelling = _Spelling(family)
    # what no template knows has no layer either
    strays = [w for w in weights if w.layer is None and bare_role(w.role) == "other"]
    result: list[SmoothingGroup] = []
    for members in layers.values():
        groups = _norms(members, named, spelling)
        readers = {r for entry in family.data.norms.values() for r in entry.feeds}
        read = [w.name for g in groups for w in g.consumers]
        orphans = [w for w in members if _reads(w, readers) and w.name not in read]
        if orphans:
            groups.append(SmoothingGroup(orphans[0].name, (), tuple(orphans), 0))
        for group in groups:
            problem = _norm_problem(group, members + strays, read, orphans, mtp, tied)
            result.append(replace(group, refusal=problem or _problem(group, family, quantized)))
        if products and family.data.linear_up:
            products_here = _products(members, named)
            result += [replace(g, refusal=_problem(g, family, quantized)) for g in products_here]
    return result


class _Spelling:
    """A family's templates for norms, asked by full tensor names."""

    def __init__(self, family: Family) -> None:
        self.data = family.data
        inner = (*self.data.prefixes, "")
        self._prefixes = tuple(m + p for m in self.data.mtp_prefixes for p in inner) + inner
        self._norms = Templates((t, t) for t in self.data.norms)
        self._centred = Templates((t, t) for t in self.data.zero_centred_norms)

    def norm(self, name: str) -> str | None:
        """The template of a norm that feeds something."""
        return self._find(self._norms, name)

    def is_centred(self, name: str) -> bool:
        return self._find(self._centred, name) is not None

    def any_of(self, templates: Iterable[str], names: Iterable[str]) -> bool:
        wanted = Templates((t, t) for t in templates)
        return any(self._find(wanted, name) is not None for name in names)

    def _find(self, templates: Templates, name: str) -> str | None:
        normalised = normalise(name)
        for prefix in self._prefixes:
            match = templates.find(normalised[len(prefix) :]) if normalised.startswith(prefix) else None
            if match is not None:
                return match.value
        return None


def _norms(members: list[Weight], named: dict[str, Weight], spelling: _Spelling) -> list[SmoothingGroup]:
    norms = [w for w in members if bare_role(w.role) == "norm"]
    groups = []
    for weight in norms:
        template = spelling.norm(weight.name)
        if template is None:
            continue
        entry = spelling.data.norms[template]
        if spelling.any_of(entry.unless, (w.name for w in norms)):
            continue
        consumers = tuple(w for w in members if _reads(w, entry.feeds))
        if not consumers and (entry.feeds != ("lm_head",) or weight.role != "norm"):
            continue
        producers = [Producer(weight, "zero_centred" if spelling.is_centred(weight.name) else "norm")]
        bias = named.get(weight.name.removesuffix(".weight") + ".bias")
        if bias is not None:
            producers.append(Producer(bias, "bias"))
        groups.append(SmoothingGroup(weight.name, tuple(producers), consumers, weight.shape[0] if weight.shape else 0))
    return groups


def _products(members: list[Weight], named: dict[str, Weight]) -> list[SmoothingGroup]:
    by_role: dict[str, list[Weight]] = {}
    for weight in members:
        by_role.setdefault(bare_role(weight.role), []).append(weight)
    groups = []
    for up_role, gate_role, down_role in _PRODUCTS:
        ups, downs = by_role.get(up_role, []), by_role.get(down_role, [])
        if len(ups) != 1 or len(downs) != 1 or (gate_role and gate_role not in by_role):
            continue
        up, down = ups[0], downs[0]
        parts = {name: (start, stop) for name, start, stop in up.row_parts}
        producers = [Producer(up, "rows", parts.get("up"))]
        bias = named.get(up.name.removesuffix(".weight") + ".bias")
        if bias is not None:
            producers.append(Producer(bias, "bias"))
        experts = down.shape[0] if len(down.shape) == 3 else None
        groups.append(SmoothingGroup(up.name, tuple(producers), (down,), _columns(down), experts))
    return groups


def _norm_problem(
    group: SmoothingGroup, members: list[Weight], read: list[str], orphans: list[Weight], mtp: bool, tied: bool
) -> str | None:
    """Why a norm is not certain to feed exactly the group's consumers."""
    if not group.producers:
        return "no norm is known to feed it"
    if not group.consumers:
        return "the output weights are tied to the embeddings, which no norm feeds"
    if any(w.role == "lm_head" for w in group.consumers):
        if tied:
            return "the output weights are tied to the embeddings, which no norm feeds"
        if mtp:
            return "the layers that predict further tokens share lm_head and read this norm"
    elif hidden := next((w for w in orphans if bare_role(w.role) != "lm_head"), None):
        return f"{hidden.name} in the same layer reads an input that is not known"
    twice = next((w.name for w in group.consumers if read.count(w.name) > 1), None)
    if twice:
        return f"more than one norm may feed {twice}"
    attention = any(bare_role(w.role).startswith("attention.") for w in group.consumers)
    for weight in members:
        role = bare_role(weight.role)
        if not any(is_under(role, obscure) for obscure in _OBSCURE) or (role == "indexer" and not attention):
            continue
        beside = weight.layer is not None or weight.name.startswith(_place(group.producers[0].weight))
        if beside and len(weight.shape) > 1 and weight.shape[-1] == group.channels:
            return f"{weight.name} may read this norm too"
    return None


def _problem(group: SmoothingGroup, family: Family, quantized: Collection[str]) -> str | None:
    """Why the tensors of a group cannot be scaled."""
    if family.is_generic:
        return "the architecture is unknown, so what reads a norm is a guess"
    if not family.data.smoothing:
        return f"the family {family.name} does not say what reads a norm"
    for weight in (*(p.weight for p in group.producers), *group.consumers):
        if weight.name in quantized or weight.dtype not in _PLAIN or weight.role.startswith("quantized."):
            return f"{weight.name} is quantized in the source"
    for producer in group.producers:
        if producer.kind != "rows":
            fits = producer.weight.shape == (group.channels,)
        elif producer.weight.interleaved or (producer.rows is None and producer.weight.row_parts):
            fits = False
        else:
            first, stop = producer.rows or (0, _rows(producer.weight))
            lead = producer.weight.shape[0] if len(producer.weight.shape) == 3 else None
            fits = stop - first == group.channels and lead == group.experts
        if not fits:
            return f"{producer.weight.name} has the shape {list(producer.weight.shape)}, not {group.channels} channels"
    for weight in group.consumers:
        if len(weight.shape) < 2 or _columns(weight) != group.channels:
            return f"{weight.name} has the shape {list(weight.shape)}, not {group.channels} input columns"
    return None


def _place(norm: Weight) -> str:
    """What the names of a norm's layer begin with; nothing where it belongs to no layer."""
    parts = split_numbers(norm.name)
    index = parts.index(str(norm.layer), 1) if norm.layer is not None and str(norm.layer) in parts else 0
    return "".join(parts[: index + 1]) + "." if index else ""


def _reads(weight: Weight, roles: Collection[str]) -> bool:
    # a router's correction is added to its output and reads nothing
    return bare_role(weight.role) in roles and len(weight.shape) > 1


def _columns(weight: Weight) -> int:
    return weight.shape[-2 if weight.transposed else -1]


def _rows(weight: Weight) -> int:
    return weight.shape[-1 if weight.transposed else -2]
