"""Attention over a paged cache: `op.py` has the public functions."""
