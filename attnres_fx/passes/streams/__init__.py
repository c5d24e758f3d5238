"""From formal sums to residual streams, and what is refused."""
