"""Language models: the decoder transformer, its jax twin, exchanged checkpoints, generation."""
