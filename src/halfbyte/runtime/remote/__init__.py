"""Files that load checkpoints in transformers, here and, copied beside the weights, without halfbyte."""
