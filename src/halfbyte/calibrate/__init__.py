"""Calibration runs: text goes through a model, and what its matrices see is summed up; needs torch."""
