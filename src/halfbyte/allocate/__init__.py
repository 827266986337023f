"""Which weight gets which format, so that a size is met with the least loss."""

from halfbyte.allocate.allocation import FORMATS, Allocated, allocate_recipe, smallest_recipe

__all__ = ["FORMATS", "Allocated", "allocate_recipe", "smallest_recipe"]
