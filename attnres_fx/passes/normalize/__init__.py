"""Passes that make a captured graph readable: no hidden regions, no mutation, no fused additions."""
