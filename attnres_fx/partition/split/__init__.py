"""A converted graph as a chain of sublayers, and as stages."""
