"""Floor 2: from an image size to a plan of views, from a picture to packed patches."""
