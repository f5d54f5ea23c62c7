"""Pre-training of the visual detail injection module (VDIM), the upsampler of LLaVA-UHD v2."""
