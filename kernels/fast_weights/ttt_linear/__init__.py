"""TTT-Linear: a linear model per head, trained on the sequence by mini-batches."""
