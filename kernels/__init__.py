"""What makes it fast: each op is a definition (reference.py), fast paths, one function (op.py)."""
