"""Layer 3: arrays in, search structures out. The only layer that knows FAISS."""
