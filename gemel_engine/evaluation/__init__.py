"""Finished runs, judged by gold labels."""
