"""Engines that answer the rollouts of the search."""
