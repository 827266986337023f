"""From a normalised tensor name to everything that its role implies."""

from __future__ import annotations

from dataclasses import dataclass, replace

from halfbyte.models.family_schema import FamilyFile
from halfbyte.models.name_templates import Match, Templates
from halfbyte.models.roles import bare_role, is_matrix, is_under


@dataclass(frozen=True, slots=True)
class Kind:
    """What all names of one pattern share.

    `mtp_role` holds in a layer beyond the main model's. `is_matrix` says that the role is one of matrices,
    `is_stack` that one tensor of it may hold several matrices. `layer` and `expert` say which number of the
    name is which. `group` names the fusion group. A per-expert name has the pattern of its fused weight in
    `fused`, its own place among `parts`, and the patterns of all of them in `spellings`.
    """

    role: str
    mtp_role: str
    is_matrix: bool
    is_stack: bool
    layer: int | None = None
    expert: int | None = None
    group: str | None = None
    fused: str | None = None
    part: int = 0
    parts: tuple[str, ...] = ()
    spellings: tuple[str, ...] = ()

    def role_for(self, plain: bool, dimensions: int, in_mtp: bool) -> str:
        """The role of a tensor of this kind, with its dtype (plain: not packed), shape and layer considered."""
        role = self.mtp_role if in_mtp else self.role
        if not self.is_matrix:
            return role
        if not plain:
            return f"quantized.{role}"
        if dimensions >= 2:
            return role
        space = role.split(".")[0]
        return f"{space}.other" if space in {"mtp", "vision", "audio"} else "other"


class Classifier:
    """The templates of one family, ready to be asked."""

    def __init__(self, data: FamilyFile) -> None:
        self._data = data
        self._vision = Templates(data.vision.items())
        entries = list(data.roles.items())
        self._parts: dict[str, tuple[str, int]] = {}
        for fused, layout in data.experts.items():
            entries.append((fused, layout.role))
            for index, template in enumerate(layout.parts.values()):
                self._parts[template] = (fused, index)
        # an expert's template must not lose to a wide template such as `*.gate_proj.weight`
        self._experts = Templates((template, template) for template in self._parts)
        entries.sort(key=lambda entry: "*" in entry[0])
        self._roles = Templates(entries)
        self._group_of = {role: name for name, roles in data.groups.items() for role in roles}

    def kind(self, normalised: str) -> Kind:
        """The kind of all names that normalise to `normalised`; its role is `other` when no template fits."""
        for space, prefixes in (("vision.", self._data.vision_prefixes), ("audio.", self._data.audio_prefixes)):
            for prefix in prefixes:
                if normalised.startswith(prefix):
                    match = self._vision.find(normalised[len(prefix) :])
                    role = match.value if match else "vision.other"
                    return _kind_of(space + role.removeprefix("vision."), space)
        for prefix in self._data.mtp_prefixes:
            if normalised.startswith(prefix):
                inner = (prefix, *(prefix + more for more in self._data.prefixes))
                return self._text(normalised, inner, "mtp.") or _kind_of("mtp.other", "mtp.")
        return self._text(normalised, (*self._data.prefixes, ""), "") or _kind_of("other", "")

    def _text(self, normalised: str, prefixes: tuple[str, ...], wrapper: str) -> Kind | None:
        for prefix in prefixes:
            if not normalised.startswith(prefix):
                continue
            stripped = normalised[len(prefix) :]
            kind = self._plain(prefix, stripped, wrapper) or self._quantized(prefix, stripped, wrapper)
            if kind is not None:
                return kind
        return None

    def _quantized(self, prefix: str, stripped: str, wrapper: str) -> Kind | None:
        for suffix in self._data.quantized_suffixes:
            if not stripped.endswith(suffix):
                continue
            for ending in (".weight", ""):
                inner = self._plain(prefix, stripped.removesuffix(suffix) + ending, wrapper)
                if inner is not None and inner.is_matrix:
                    role, mtp_role = f"quantized.{inner.role}", f"quantized.{inner.mtp_role}"
                    return Kind(role, mtp_role, False, False, inner.layer, inner.expert)
        return None

    def _plain(self, prefix: str, stripped: str, wrapper: str) -> Kind | None:
        match = self._experts.find(stripped)
        if match is not None:
            return self._expert(prefix, match, wrapper)
        match = self._roles.find(stripped)
        if match is None:
            return None
        return replace(
            _kind_of(_wrap(wrapper, match.value), wrapper),
            layer=match.layer,
            expert=match.expert,
            group=self._group_of.get(match.value),
        )

    def _expert(self, prefix: str, match: Match, wrapper: str) -> Kind:
        fused, index = self._parts[match.value]
        layout = self._data.experts[fused]
        return replace(
            _kind_of(_wrap(wrapper, layout.role), wrapper),
            layer=match.layer,
            expert=match.expert,
            fused=prefix + fused,
            part=index,
            parts=tuple(layout.parts),
            spellings=tuple(prefix + template for template in layout.parts.values()),
        )


def _kind_of(role: str, wrapper: str) -> Kind:
    return Kind(
        role=role,
        mtp_role=role if wrapper else _wrap("mtp.", role),
        is_matrix=is_matrix(role) and not role.startswith("quantized."),
        is_stack=is_under(bare_role(role), "experts") or role.endswith(".gate_up"),
    )


def _wrap(wrapper: str, role: str) -> str:
    return role if role.startswith((wrapper, "quantized.")) else wrapper + role
