"""The whole story offline: a small real model and a corpus that every CPython carries."""
