"""Floor 2: what acts between the layers of the language model."""
