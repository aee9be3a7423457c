"""Models of the world that an agent acts in, and planning with them."""
