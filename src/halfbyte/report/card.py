"""The old name of ``halfbyte.report.model_card``; it goes with release 0.2."""

from halfbyte.report.model_card import Card, model_card

__all__ = ["Card", "model_card"]
