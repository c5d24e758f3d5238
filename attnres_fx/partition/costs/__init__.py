"""What sublayers and stages cost: operations, bytes, seconds, memory, traffic."""
