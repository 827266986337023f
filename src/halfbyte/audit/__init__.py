"""Audit: anybody's quantized checkpoint, what is wrong with it, and what of it an engine would break on."""
