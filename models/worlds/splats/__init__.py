"""Models of a world that are made of 3D Gaussians, which any camera may look at."""
