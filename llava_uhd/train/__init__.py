"""Floor 6: training, `python -m llava_uhd.train RECIPE`."""
