"""Layer 1: files → documents → tokens → windows."""
