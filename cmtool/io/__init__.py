"""Everything that opens files: images, data sets, checkpoints."""
