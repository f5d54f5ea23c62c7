"""Floor 6: measurements, side by side in one run."""
