"""A memory folder on disk: a snapshot of arrays, its manifest, and how it is changed safely."""
