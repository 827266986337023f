"""Source checkpoints: weights with roles and formats, read in slices; overview; smoothing."""
