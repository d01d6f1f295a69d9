"""From pictures to visual prefixes."""
