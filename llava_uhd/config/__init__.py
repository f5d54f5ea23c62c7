"""Floor 1: what a model is and what a training run is, as typed, validated values."""
