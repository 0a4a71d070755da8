"""Memorizing attention: earlier segments of a document as cached keys and values."""
