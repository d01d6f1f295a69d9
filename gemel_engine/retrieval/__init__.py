"""Demonstrations for a mention."""
