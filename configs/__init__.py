"""Values only. The schema of every group is a dataclass in training/schema.py."""
