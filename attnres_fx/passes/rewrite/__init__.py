"""Depth attention in the place of residual additions."""
