"""Multimodal entity linking by generating entity names."""
