"""Losses of a linear head without its logits: `kernels.cross_entropy.op` has the functions."""
