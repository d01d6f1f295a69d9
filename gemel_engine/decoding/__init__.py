"""Prompts, the frozen language model, and the exact search for an entity name."""
