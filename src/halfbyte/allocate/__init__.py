"""Which weight gets which format, so that a size is met with the least loss."""

from halfbyte.allocate.allocation import FORMATS, Allocated, AllocateOptions, allocate_recipe, smallest_recipe

__all__ = ["FORMATS", "AllocateOptions", "Allocated", "allocate_recipe", "smallest_recipe"]
