"""Layer 8: what one does with a memory; each verb stands alone."""
