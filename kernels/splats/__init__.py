"""Splatting: `kernels.splats.op.rasterize` is the public function."""
