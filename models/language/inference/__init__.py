"""Running a trained language model: cached generation."""
