"""How much each component of a prediction counts, and whether a dense search is worth it."""
