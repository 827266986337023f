"""Fuzzing of everything that halfbyte reads from strangers; run it with ``python -m fuzz``."""
