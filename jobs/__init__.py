"""What a person runs: one entry point a file."""
