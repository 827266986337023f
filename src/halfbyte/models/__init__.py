"""What the tensors of a model are: roles, fused layouts, fusion groups per family, as data."""

from halfbyte.models.family import Family, families, family_for, register_family
from halfbyte.models.weight import Piece, Weight

__all__ = ["Family", "Piece", "Weight", "families", "family_for", "register_family"]
