"""Layer 6: a Hugging Face model with a memory attached."""
