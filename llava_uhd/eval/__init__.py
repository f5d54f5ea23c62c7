"""Floor 6: evaluation, `python -m llava_uhd.eval run DIR`."""
