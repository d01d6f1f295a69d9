"""Pictures to visual prefixes."""
