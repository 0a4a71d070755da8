"""Layer 10: HTML pages and figures that need nothing else, in one look."""
