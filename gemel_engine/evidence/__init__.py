"""Searchable indexes of entities' names, aliases, descriptions and pictures."""
