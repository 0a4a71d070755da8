"""Layer 5: from a query to a distribution over the next token; the mathematics is pure."""
