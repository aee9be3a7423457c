"""How models are trained and judged: the one loop, its recipes, data, checkpoints, evaluation."""
