"""Layer 2: any Hugging Face language model's hidden states as keys."""
