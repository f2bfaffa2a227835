"""Training on any number of ranks."""
