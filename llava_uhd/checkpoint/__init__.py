"""Floor 5: reading and writing checkpoints, ours and the published layouts."""
