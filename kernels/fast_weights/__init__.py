"""Sequence layers whose state is the weights of a small model, trained on the sequence itself."""
