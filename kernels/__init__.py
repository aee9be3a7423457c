"""What makes it fast: each op is a definition (reference.py) beside its fast paths and one public function (op.py)."""
