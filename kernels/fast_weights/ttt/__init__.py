"""TTT layers: a small model per head, trained on the sequence by mini-batches as it is read."""
