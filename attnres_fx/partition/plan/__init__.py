"""A plan as data, its file, its table and its plots."""
