"""Patches: a fine-tuned 4-bit checkpoint as the difference to its base, exact to the bit."""
