"""What files hold: programs, tensors and structures as plain data, and back."""
