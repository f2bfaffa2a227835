"""A run directory: its files, its checkpoints, and the records of its evaluations."""
