"""What the compiler makes of every shipped tile, seen without a GPU: `python -m kernels.audit`."""
