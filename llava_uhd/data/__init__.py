"""Floor 4: from records on disk to padded batches."""
