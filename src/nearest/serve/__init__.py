"""An OpenAI-compatible server whose answers show which documents caused which token."""
