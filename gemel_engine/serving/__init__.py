"""A page and a JSON API to try a linking configuration."""
