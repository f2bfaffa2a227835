"""What can go wrong while training, and how the ranks agree on it."""
