"""Writing new keys and values into a paged cache: normalise, rotate, quantise, scatter."""
