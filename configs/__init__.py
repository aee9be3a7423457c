"""Values only. The schema of every group is a dataclass that training/options.py names."""
