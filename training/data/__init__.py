"""Corpora and the counter-based order in which a run visits them."""
