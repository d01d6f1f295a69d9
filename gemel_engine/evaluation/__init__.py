"""Evaluate finished runs against gold labels, compare two runs, fit calibrations."""
