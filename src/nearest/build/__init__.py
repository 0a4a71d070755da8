"""From documents to a memory: build one, and change it."""
