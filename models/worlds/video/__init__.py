"""Models of a world that draw it: what a frame will look like, given what was seen and done."""
