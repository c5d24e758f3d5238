"""What a model attends to over depth."""
