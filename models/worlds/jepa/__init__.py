"""Joint-embedding predictive architectures: predict what will be seen in the space of what is
learned from it, never in pixels.
"""
