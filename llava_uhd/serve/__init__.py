"""Floor 6: talking to a model."""
