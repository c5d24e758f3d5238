"""Passes that lower depth attention to fused and batched operators."""
