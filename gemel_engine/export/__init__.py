"""A run's answers joined with its input, in formats that other tools read."""
