"""Attention: `kernels.attention.op.attention` is the public function."""
