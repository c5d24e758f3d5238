"""One training step of a pipeline in time, before anything runs."""
