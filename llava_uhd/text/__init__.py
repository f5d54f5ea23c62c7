"""Floor 3: conversation templates, the spatial layout as text, the processor."""
