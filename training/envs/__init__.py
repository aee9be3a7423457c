"""Worlds that a model acts in: their physics, what is seen of them, scripted policies."""
