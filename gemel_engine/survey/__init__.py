"""Surveys before the first run: what a corpus has, and what a machine lacks."""
