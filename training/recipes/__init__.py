"""One file per objective: what a training step is."""
