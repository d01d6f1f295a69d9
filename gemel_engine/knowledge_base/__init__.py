"""Entities and the prefix trie of their names."""
