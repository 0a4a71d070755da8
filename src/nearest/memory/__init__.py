"""Layer 4: the memory folder: its manifest, segments, and how a generation is written and read."""
