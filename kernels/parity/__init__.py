"""Kernels against their definitions on random inputs: shared by tests, GPU runs and the README."""
