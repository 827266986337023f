"""The conversion: plan to files, side by side, resumable."""
