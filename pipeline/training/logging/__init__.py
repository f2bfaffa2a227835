"""What is logged while training."""
