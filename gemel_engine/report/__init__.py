"""Render a run as one HTML file."""
