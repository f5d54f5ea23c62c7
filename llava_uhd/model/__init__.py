"""Floor 4: tower, projector and language model as one model."""
