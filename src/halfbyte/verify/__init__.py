"""Verification: an output against its plan and its source."""
