"""Language models: the decoder transformer and its jax twin, checkpoints of other families, generation."""
