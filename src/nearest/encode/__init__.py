"""Layer 2: any Hugging Face causal language model's hidden states as keys."""
